# Lets the kernel patch its own code while other CPUs run it: static keys (scheduler statistics, trace points), calls of the function
# tracer, and probes within functions. How long comes on the kernel's command line: stress.seconds=N. The lines that start with
# "stress-" are for xtask/src/task_stress.rs.
seconds=60
for word in $(cat /proc/cmdline); do
    case $word in
        stress.seconds=*) seconds=${word#*=} ;;
    esac
done
echo "cpus-online $(cat /sys/devices/system/cpu/online)"
mount -t tracefs tracefs /sys/kernel/tracing
tracing=/sys/kernel/tracing
failed=0

# Work that goes through the code in question: system calls, forks, pipes, page faults, on every CPU.
work() {
    n=0
    while [ ! -e /tmp/stop ]; do
        (exit 3)
        [ $? = 3 ] || echo "stress-broken fork"
        [ "$(echo x | cat)" = x ] || echo "stress-broken pipe"
        read -r line </proc/self/stat
        n=$((n + 1))
    done
    echo "stress-work $n"
}
workers=
for n in $(seq "$(nproc)"); do
    work &
    workers="$workers $!"
done

# The kernel takes a probe at the start of an instruction only, which lies behind the call of the tracer: 5 bytes, 9 where functions
# begin with ENDBR64.
probe() {
    for offset in 5 9; do
        echo "p:$1 $2+$offset" >>$tracing/kprobe_events 2>/dev/null && return
    done
    echo "stress-broken probe $2"
    failed=1
}

hot="vfs_read vfs_write do_sys_openat2 ksys_read ksys_write wake_up_new_task pipe_read pipe_write handle_mm_fault"
now() { cut -d. -f1 /proc/uptime; }
end=$(($(now) + seconds))
rounds=0 hits=0
while [ "$(now)" -lt $end ]; do
    for on in 1 0; do
        echo $on >/proc/sys/kernel/sched_schedstats || failed=1
        echo $on >$tracing/events/sched/enable || failed=1
        echo $on >$tracing/events/syscalls/enable || failed=1
        echo $on >$tracing/events/exceptions/enable || failed=1
    done
    echo "$hot" >$tracing/set_ftrace_filter || failed=1
    for tracer in function nop function nop; do
        echo $tracer >$tracing/current_tracer || failed=1
    done
    if [ $((rounds % 20)) = 0 ]; then
        # All functions: tens of thousands of places.
        echo >$tracing/set_ftrace_filter
        for tracer in function nop; do
            echo $tracer >$tracing/current_tracer || failed=1
        done
    fi
    for function in vfs_read vfs_write handle_mm_fault; do
        probe "in_$function" $function
        echo "p:at_$function $function" >>$tracing/kprobe_events || failed=1
        echo "r:out_$function $function" >>$tracing/kprobe_events || failed=1
    done
    for n in 1 2 3; do
        echo 1 >$tracing/events/kprobes/enable || failed=1
        (exit 0)
        cat /proc/version >/dev/null
        echo 0 >$tracing/events/kprobes/enable || failed=1
    done
    while read -r name count missed; do
        hits=$((hits + count))
    done <$tracing/kprobe_profile
    echo >$tracing/kprobe_events || failed=1
    echo >$tracing/trace
    rounds=$((rounds + 1))
    [ $((rounds % 20)) = 0 ] && echo "stress-rounds $rounds hits $hits"
done
touch /tmp/stop
wait $workers
echo "stress-rounds $rounds hits $hits"
[ $hits -gt 0 ] || failed=1
echo "stress-done $failed"
