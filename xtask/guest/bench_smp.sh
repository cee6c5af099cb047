# As many copies of a program at a time as there are CPUs, then a compressor with as many threads; runs on the host as it does in guests.
# ROOT is the folder with Debian's programs, WORK one for files, COPIES how many. The lines that start with "smp-" are for
# xtask/src/task_bench_smp.rs.
libraries=$ROOT/lib/x86_64-linux-gnu:$ROOT/usr/lib/x86_64-linux-gnu
program() {
    path=$1
    shift
    "$ROOT/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" --library-path "$libraries" "$ROOT/$path" "$@"
}
# Something that a compressor has work with: a program.
head -c 16000000 "$ROOT/usr/lib/gcc/x86_64-linux-gnu/12/cc1" >"$WORK/data"

now() { cut -d' ' -f1 /proc/uptime; }
timed() {
    name=$1
    shift
    before=$(now)
    "$@" || echo "smp-failed $name"
    echo "smp-time $name $before $(now)"
}
copies() {
    running=
    for n in $(seq "$COPIES"); do
        "$@" &
        running="$running $!"
    done
    for one in $running; do
        wait "$one" || return 1
    done
}

loop() { program usr/bin/perl -e 'my ($s, %h) = (0); for my $i (1 .. 12000000) { $s = ($s * 31 + $i) & 0xffffff; } print "$s\n"' >"$WORK/null"; }
data_often=$(for n in $(seq 30); do echo "$WORK/data"; done)
# shellcheck disable=SC2086  # Many names of files.
digest() { program usr/bin/openssl dgst -md5 $data_often >"$WORK/null"; }
# Sorts the same numbers in place, in an order of their own each time.
sorting() { program usr/bin/perl -e 'my $x = 1; my @a = map { $x = ($x * 1103515245 + 12345) & 0x7fffffff } 1 .. 20000; for my $i (1 .. 90) { my $k = $i * 2654435761 & 0x7fffffff; @a = sort { ($a ^ $k) <=> ($b ^ $k) } @a } print "$a[0]\n"' >"$WORK/null"; }
# Half of its time or more goes into memory that it has for the first time.
growing() { program usr/bin/perl -e 'my $x = 1; my @a = map { $x = ($x * 1103515245 + 12345) & 0x7fffffff } 1 .. 400000; @a = sort { $a <=> $b } @a for 1 .. 2; print "$a[0]\n"' >"$WORK/null"; }
gzip_one() { program bin/gzip -6 -c "$WORK/data" >"$WORK/null"; }
xz_threads() { program usr/bin/xz -1 "-T$COPIES" --block-size=1MiB -c "$WORK/data" >"$WORK/null"; }

ln -sf /dev/null "$WORK/null"
timed compute-loop copies loop
timed compute-digest copies digest
timed compute-sort copies sorting
timed memory-grow copies growing
timed compress-gzip copies gzip_one
timed compress-xz xz_threads
echo "smp-done"
