// csrc/grid61.cu as host code: blocks and threads one after the other. Loaded by cuda_on_host.py.
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
static Index gridDim, blockDim, blockIdx, threadIdx;

static void atomicAdd(unsigned long long* sum, unsigned long long value) { *sum += value; }

#include "../../csrc/grid61.cu"

// stores: null, or where all that is digested goes.
extern "C" void grid61_on_host(const u64* keys, i64 axes, const Segment* segments, i64 segment_count,
                               const Store* stores, const u32* segment_of_tile, i64 tiles, i64 half_count, u64* table, u64* steps,
                               u64* halves, u64* sums) {
  gridDim.x = 1, blockDim.x = 256, blockIdx.x = 0;
  for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) {
    grid61_prepare(keys, axes, segments, segment_count, half_count, table, steps, halves);
  }
  gridDim.x = (unsigned)((tiles * 32 + 255) / 256);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) {
      if (stores) {
        grid61_copies(segments, stores, segment_of_tile, tiles, table, axes, steps, halves);
      } else {
        grid61_sums(segments, segment_of_tile, tiles, table, axes, steps, halves);
      }
    }
  }
  i64 count = half_count / 2;
  gridDim.x = (unsigned)((count + 255) / 256);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) grid61_finish(halves, count, sums);
  }
}
