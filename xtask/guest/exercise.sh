# The standard work of a boot test. Every line 'T name result' carries a value that the guest had to compute;
# tests/src/exercise.rs holds what each must be.

# A loop of shell arithmetic: the interpreter's own code, no system calls.
i=0 sum=0
while [ $i -lt 20000 ]; do
    sum=$((sum + i))
    i=$((i + 1))
done
echo "T loop $sum"

# A hundred forks whose exit status must come back, and twenty with an exec.
n=0
for i in $(seq 1 100); do
    (exit 3)
    [ $? = 3 ] && n=$((n + 1))
done
echo "T fork $n"
n=0
for i in $(seq 1 20); do
    /bin/busybox true && n=$((n + 1))
done
echo "T exec $n"

# Pipes: three processes, more data than a pipe's buffer holds.
echo "T pipe $(seq 1 20000 | sort -rn | md5sum | cut -c1-32) $(seq 1 20000 | cat | cat | md5sum | cut -c1-32)"

# Block copies through the page cache, checked from the outside by a known digest.
dd if=/dev/zero of=/tmp/zero bs=64k count=256 2>/dev/null
echo "T dd $(stat -c %s /tmp/zero) $(sha256sum /tmp/zero | cut -c1-64)"
rm /tmp/zero
seq 1 20000 >/tmp/numbers
dd if=/tmp/numbers of=/tmp/copy bs=777 2>/dev/null
echo "T copy $(cmp /tmp/numbers /tmp/copy && sha1sum </tmp/copy | cut -c1-40)"

# Compression there and back.
gzip -c /tmp/numbers >/tmp/numbers.gz
echo "T gzip $(gunzip -c /tmp/numbers.gz | md5sum | cut -c1-32)"

# Floating point: SSE here, x87 in the 32-bit program below.
echo "T float $(awk 'BEGIN { for (i = 1; i <= 2000; i++) s += 1 / i; printf "%.6f", s }')"

# A signal delivered to the shell and its handler run.
got=none
trap 'got=usr1' USR1
kill -USR1 $$
echo "T signal $got"

# A child in the background, killed and waited for: 128 + SIGTERM.
sleep 100 &
kill $!
wait $!
echo "T kill $?"

# The clock: two seconds of sleep must be two seconds of the guest's own clock. A benchmark times work, not waiting.
if ! grep -q paravane.bench /proc/cmdline; then
    before=$(cut -d. -f1 /proc/uptime)
    sleep 2
    after=$(cut -d. -f1 /proc/uptime)
    echo "T sleep $(((after - before) >= 2 && (after - before) <= 4))"
fi

# 32-bit user space: a static i386 program, its arithmetic, its forks and pipes.
if [ -x /bin/busybox32 ]; then
    class=$(dd if=/bin/busybox32 bs=1 skip=4 count=1 2>/dev/null | hexdump -e '1/1 "%d"')
    echo "T i386-class $class"
    echo "T i386-uname $(/bin/busybox32 linux32 /bin/busybox32 uname -m)"
    echo "T i386-md5 $(/bin/busybox32 md5sum </tmp/numbers | cut -c1-32)"
    echo "T i386-float $(/bin/busybox32 awk 'BEGIN { for (i = 1; i <= 2000; i++) s += 1 / i; printf "%.6f", s }')"
    echo "T i386-shell $(/bin/busybox32 sh -c 'n=0; for i in 1 2 3 4 5; do (exit 3); [ $? = 3 ] && n=$((n + 1)); done; echo $n | /bin/busybox32 cat')"
fi

# What init mounted.
for what in 'proc /proc proc' 'sysfs /sys sysfs' 'devtmpfs /dev devtmpfs'; do
    grep -q "^$what " /proc/mounts && echo "T mount $what"
done
echo "T devices $(ls /sys/class | grep -cx -e tty -e mem -e net)"
echo "T done"
