# Sourced by the scripts beside it: waits for the processes in pids, and ends as one that failed did.
status=0
for pid in "${pids[@]}"; do
    wait "$pid" && code=0 || code=$?
    # A signal ends `wait` early.
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" && code=0 || code=$?; done
    [ "$code" -eq 0 ] || status=$code
done
exit "$status"
