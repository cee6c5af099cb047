#!/bin/busybox sh
# First process of the test guest: mounts what user space needs, then runs a script or a shell, then powers off.
#
# A script comes from one of two places: a file /script in the archive, or paravane.script=NAME on the kernel's
# command line, which names /scripts/NAME. Its exit status is printed on a line of its own so that whoever
# reads the console knows how it went.
export PATH=/sbin:/bin HOME=/ TERM=${TERM:-linux}

/bin/busybox mkdir -p /proc /sys /dev /tmp /sbin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
grep -q ' /dev devtmpfs ' /proc/mounts || mount -t devtmpfs devtmpfs /dev

script=
[ -f /script ] && script=/script
for word in $(cat /proc/cmdline); do
    case $word in
        paravane.script=*) script=/scripts/${word#paravane.script=} ;;
    esac
done

if [ -n "$script" ]; then
    if [ -f "$script" ]; then
        sh "$script" </dev/null
        echo "paravane-script: exit $?"
    else
        echo "paravane-script: no script named $script in the initramfs"
    fi
else
    echo
    echo "Linux $(uname -r) on $(uname -m), busybox shell. 'poweroff -f' or leaving the shell stops the guest."
    setsid cttyhack sh
fi
poweroff -f
