# Runs stress-ng on all CPUs: each class for a part of half of the time, then all of them together. How long comes on the
# kernel's command line: stress.seconds=N. The lines that start with "stress-" are for xtask/src/task_stress.rs.
seconds=60
for word in $(cat /proc/cmdline); do
    case $word in
        stress.seconds=*) seconds=${word#*=} ;;
    esac
done
cpus=$(nproc)
mount -t tmpfs tmpfs /tmp
cd /tmp
echo "cpus-online $(cat /sys/devices/system/cpu/online)"
ng="/usr/bin/stress-ng --verify --temp-path /tmp --oomable"
each=$((seconds / 12))
failed=0
for class in cpu vm fork futex mmap signal; do
    extra=
    case $class in
        vm) extra="--vm-bytes $((48 * cpus))M" ;;
        mmap) extra="--mmap-bytes $((32 * cpus))M" ;;
    esac
    $ng --$class "$cpus" $extra --timeout ${each}s || failed=1
    echo "stress-class $class $failed"
done
$ng --cpu 1 --vm 1 --vm-bytes 64M --fork 1 --futex 1 --mmap 1 --mmap-bytes 32M --signal 1 --timeout $((seconds / 2))s || failed=1
echo "stress-class together $failed"
echo "stress-done $failed"
