// Copies of many boxes within one device's memory, its own or mapped from another process: one block moves one
// tile. Compiled by NVRTC at first use (weightbus/memory/kernel_copies.py), and for the host by tests/runs_on_host.cpp.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// A two-dimensional copy. A unit is the widest vector that all addresses and lengths allow, 1 to 16 bytes.
struct CopyRun {
  u64 dst, src;               // addresses
  i64 width;                  // units in a row
  i64 rows;
  i64 dst_pitch, src_pitch;   // bytes
  i64 unit;                   // bytes
  i64 first_tile;
};

namespace {

constexpr u32 kBlock = 256;  // threads; as in weightbus/memory/kernel_copies.py
constexpr u32 kFlight = 4;   // loads of a thread before its first store
constexpr u32 kTile = kFlight * kBlock;  // units: short tiles in many blocks keep the memory busiest

struct alignas(16) Unit16 {
  u64 low, high;
};

template <class Unit>
__device__ __forceinline__ void copy_tile(const CopyRun& run, i64 tile) {
  i64 first = tile * kTile, total = run.width * run.rows;
  u32 count = (u32)(total - first < kTile ? total - first : kTile);
  // A tile starts anywhere in its row; within it, 32 bits are enough: rows of several are below 2**31 bytes.
  i64 row = run.rows == 1 ? 0 : first / run.width;
  u32 column = run.rows == 1 ? 0 : (u32)(first - row * run.width);
  u32 width = run.rows == 1 ? kTile : (u32)run.width;
  i64 start = run.rows == 1 ? first * (i64)sizeof(Unit) : 0;
  const char* src = (const char*)run.src + start + row * run.src_pitch;
  char* dst = (char*)run.dst + start + row * run.dst_pitch;
  Unit held[kFlight];
#pragma unroll
  for (u32 k = 0; k < kFlight; ++k) {
    u32 at = threadIdx.x + k * kBlock + column, down = at / width;
    if (threadIdx.x + k * kBlock < count) held[k] = ((const Unit*)(src + down * run.src_pitch))[at - down * width];
  }
#pragma unroll
  for (u32 k = 0; k < kFlight; ++k) {
    u32 at = threadIdx.x + k * kBlock + column, down = at / width;
    if (threadIdx.x + k * kBlock < count) ((Unit*)(dst + down * run.dst_pitch))[at - down * width] = held[k];
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256) copy_runs(const CopyRun* runs, const u32* run_of_tile) {
  const CopyRun run = runs[run_of_tile[blockIdx.x]];
  i64 tile = blockIdx.x - run.first_tile;
  switch (run.unit) {
    case 16: return copy_tile<Unit16>(run, tile);
    case 8: return copy_tile<u64>(run, tile);
    case 4: return copy_tile<u32>(run, tile);
    case 2: return copy_tile<unsigned short>(run, tile);
    default: return copy_tile<unsigned char>(run, tile);
  }
}
