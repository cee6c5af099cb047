#!/bin/busybox sh
# First process of the Debian guest: loads the stock kernel's virtio modules, mounts the disk, hands over to systemd.
#
# The kernel has ext4 built in and every virtio driver as a module; /modules lists them in the order they need.
# root=DEVICE on the kernel's command line names another disk than /dev/vda.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
grep -q ' /dev devtmpfs ' /proc/mounts || mount -t devtmpfs devtmpfs /dev

root=/dev/vda
mode=rw
for word in $(cat /proc/cmdline); do
    case $word in
        root=*) root=${word#root=} ;;
        ro) mode=ro ;;
    esac
done

while read -r module; do
    insmod "/lib/$module" || echo "initramfs: $module does not load"
done </modules

# The drivers find their devices while they load; a slow transport gets ten seconds more.
tries=0
while [ ! -b "$root" ] && [ $tries -lt 500 ]; do
    usleep 20000
    tries=$((tries + 1))
done
if mount -t ext4 -o $mode "$root" /root; then
    umount /proc /sys
    mount -o move /dev /root/dev
    exec switch_root /root /sbin/init
fi
echo "initramfs: $root cannot be mounted. Is the disk attached? A shell follows."
exec setsid cttyhack sh
