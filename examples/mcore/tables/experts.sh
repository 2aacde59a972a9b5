# Sourced by the families with experts before a table is read: what they say otherwise than dense models.

# shellcheck source=../job.sh
source "$(dirname "${BASH_SOURCE[0]}")/../job.sh"

own EP 1
own CP 1
own CP_TYPE megatron_cp_algo
own MOE_GROUPED_GEMM 1
own MOE_PERMUTATION_ASYNC_COMM 1
own MOE_TOKEN_DISPATCHER_TYPE alltoall
own MOE_ALLTOALL_OVERLAP_COMM 1
own MOE_ROUTER_LOAD_BALANCING_TYPE aux_loss
