// csrc/runs.cu as host code: blocks and threads one after the other. Loaded by test_kernel_copies.py.
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
static Index blockIdx, threadIdx;

#include "../../csrc/runs.cu"

extern "C" void runs_on_host(const CopyRun* runs, const u32* run_of_tile, i64 tiles) {
  for (blockIdx.x = 0; blockIdx.x < tiles; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < kBlock; ++threadIdx.x) copy_runs(runs, run_of_tile);
  }
}
