# Sourced by the scripts that measure several GPUs.

# together WORLD_SIZE PROGRAM ARGUMENTS...: runs one process per GPU, as torchrun does. SIGTERM to a
# `together` in the background stops its processes.
together() {
    local world=$1 failed=0 rank processes=()
    shift
    trap 'kill -TERM "${processes[@]}"' TERM
    for ((rank = 0; rank < world; rank++)); do
        WORLD_SIZE=$world RANK=$rank LOCAL_RANK=$rank MASTER_ADDR=127.0.0.1 MASTER_PORT=29517 \
            NCCL_NVLS_ENABLE=0 "$@" &
        processes+=($!)
    done
    for process in "${processes[@]}"; do
        until wait "$process"; do
            # A trapped signal ends `wait` although the process still runs.
            kill -0 "$process" 2>/dev/null || { failed=1; break; }
        done
    done
    trap - TERM
    return $failed
}
