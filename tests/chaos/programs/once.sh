# One call, one process, and the worst that a shell can do. The envelope has no white space.
read -r envelope
number() { value=${envelope##*"\"$1\":"}; printf %s "${value%%[!0-9]*}"; }
case $envelope in
    *'"do":"sleep"'*) exec sleep 600 ;;
    *'"do":"deaf"'*) trap '' TERM INT HUP; while :; do sleep 600; done ;;
    *'"do":"stop"'*) kill -STOP $$ ;;
    *'"do":"mute"'*) exec sleep 600 <&- >&- 2>&- ;;
    *'"do":"fork"'*) sleep 600 & ;;
    *'"do":"double_fork"'*) (setsid sleep 600 &) ;;
    *'"do":"daemonise"'*) (cd / && trap '' TERM HUP && exec setsid env -i /bin/sleep 600 <&- >&- 2>&- &) ;;
    *'"do":"fill"'*) (ulimit -f 8192; exec cat /dev/zero >"$OVERLAY_STATE/fill") ;; # in blocks of 512 bytes
    *'"do":"leave"'*) exit "$(number with)" ;;
    *'"do":"die"'*) kill -"$(number with)" $$ ;;
    *'"do":"flood"'*) exec cat /dev/zero ;;
    *'"do":"parricide"'*) kill -KILL "$PPID" ;;
esac
printf '{"ok":true,"result":%s}\n' "$(number nonce)"
