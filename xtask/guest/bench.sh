# Runs the benchmark's programs in the guest. What to run comes on the kernel's command line:
# bench.groups=kernels,os,programs bench.only=PART,PART bench.quick=1 bench.server=ADDRESS:PORT (for traffic, as are /modules and
# /dev/vda). The lines that start with "bench-" are for
# hypervisor/bench/src/linux/console.rs, as are the rows between them.
groups=kernels,os,programs options= server=
for word in $(cat /proc/cmdline); do
    case $word in
        bench.groups=*) groups=${word#*=} ;;
        bench.only=*) options="$options --only ${word#*=}" ;;
        bench.server=*) server=${word#*=} ;;
        bench.quick=1) options="$options --quick" ;;
    esac
done

# A kernel message in the middle of a row would spoil it.
dmesg -n 1
mount -t tmpfs tmpfs /tmp

# Only the image for disk and network has modules. The addresses are those of user networking here and in QEMU.
if [ -n "$server" ]; then
    while read -r module; do
        insmod "/lib/$module" || echo "bench: $module does not load"
    done </modules
    tries=0
    while [ ! -b /dev/vda ] || [ ! -d /sys/class/net/eth0 ]; do
        usleep 20000
        tries=$((tries + 1))
        [ $tries -lt 500 ] || break
    done
    ip link set lo up
    ip addr add 10.0.2.15/24 dev eth0
    ip link set eth0 up
fi

echo "bench-begin $(bench clock)"
for group in $(echo "$groups" | tr , ' '); do
    echo "bench-group $group"
    case $group in
        kernels) bench kernels $options ;;
        os) bench os --folder /tmp $options ;;
        storms) bench storms $options ;;
        traffic) bench traffic --disk /dev/vda --server "$server" $options ;;
        programs) bench programs --root /compute --folder /tmp $options ;;
    esac
    echo "bench-status $group $?"
done
echo "bench-end $(bench clock)"
