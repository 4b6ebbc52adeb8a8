#!/bin/sh
# The pre-stop hook of the container: tells `mm serve` to stop, and with "wait" returns when it has.
#
#   stop.sh [wait]
#
# It stands at /opt/kserve/mmesh/stop.sh in the image, where deployments made for the Java mesh call
# it. Nothing is written, so that any user and a read-only root file system will do: the process is
# found by its command line, alone or beside others where containers of a pod share their processes.
# Exit code 0 if it was told (and has ended), also if there is none any more; 1 if there are several.
set -eu

# Another directory than /proc is for tests.
proc=${MM_PROC:-/proc}
found=
for directory in "$proc"/[0-9]*; do
    # Whoever has ended meanwhile has no command line.
    line=$(tr '\0' ' ' 2>/dev/null <"$directory/cmdline") || continue
    case $line in *\ mm\ serve\ * | */mm\ serve\ *) ;; *) continue ;; esac
    # Not a shell or an init that was told to start it.
    case $(readlink "$directory/exe") in */python*) found="$found ${directory##*/}" ;; esac
done

# Not quoted: words are process ids.
set -- "${1:-}" $found
case $# in
    1) echo "stop.sh: no mm serve runs here" >&2; exit 0 ;;
    2) ;;
    *) echo "stop.sh: more than one mm serve runs here:$found" >&2; exit 1 ;;
esac

# Process 1 of a container does not hear what it has no handler for, and a start takes a moment.
looks=0
while [ $looks -lt 50 ]; do
    caught=$(sed -n 's/^SigCgt:.*\(....\)$/\1/p' "$proc/$2/status" 2>/dev/null) || break
    [ $((0x${caught:-ffff} & 0x4000)) -eq 0 ] || break
    looks=$((looks + 1))
    sleep 0.2
done
kill -TERM "$2" 2>/dev/null || exit 0
if [ "$1" = wait ]; then
    # Five times a second costs nothing, and Kubernetes goes on as soon as this ends.
    while kill -0 "$2" 2>/dev/null; do sleep 0.2; done
fi
