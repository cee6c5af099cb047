# Runs the benchmark's programs in the guest. What to run comes on the kernel's command line:
# bench.groups=kernels,os,programs bench.only=PART,PART bench.quick=1. The lines that start with "bench-" are for
# xtask/src/compute_set.rs, as are the rows between them.
groups=kernels,os,programs options=
for word in $(cat /proc/cmdline); do
    case $word in
        bench.groups=*) groups=${word#*=} ;;
        bench.only=*) options="$options --only ${word#*=}" ;;
        bench.quick=1) options="$options --quick" ;;
    esac
done

# A kernel message in the middle of a row would spoil it.
dmesg -n 1
mount -t tmpfs tmpfs /tmp

echo "bench-begin $(bench clock)"
for group in $(echo "$groups" | tr , ' '); do
    echo "bench-group $group"
    case $group in
        kernels) bench kernels $options ;;
        os) bench os --folder /tmp $options ;;
        programs) bench programs --root /compute --folder /tmp $options ;;
    esac
    echo "bench-status $group $?"
done
echo "bench-end $(bench clock)"
