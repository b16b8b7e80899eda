// Copies of many pieces in one launch, casting on the way: what fills and empties buckets.
//
// It runs beside NCCL on purpose with few blocks: at full rate it would take the memory bandwidth that
// keeps the link busy, and it has a whole transfer's time. Peer copies cast by it, too: within a GPU at full rate,
// from another GPU's memory with few blocks, which the link keeps waiting.
#include "narrow.h"

// A piece: `rows` rows of `units` units; a unit is what one thread moves at a time.
struct Piece {
    long long src, dst;              // addresses
    long long units, rows;           // of one row; of the piece
    long long src_pitch, dst_pitch;  // bytes from row to row
    long long first_tile, kind;
};

constexpr int kThreads = 512, kUnroll = 4, kTile = kThreads * kUnroll;  // a tile, in units
enum Kind {
    kVectors = 0,
    kBytes = 1,
    kFloatToBfloat16 = 2,
    kFloatToHalf = 3,
    kOneToBfloat16 = 4,
    kOneToHalf = 5
};

template <int kind> struct Unit;
template <> struct Unit<kVectors> {  // 16 bytes
    static constexpr int in = 16, out = 16;
    uint4 value;
    __device__ void load(const char* at) { value = *reinterpret_cast<const uint4*>(at); }
    __device__ void store(char* at) const { *reinterpret_cast<uint4*>(at) = value; }
};
template <> struct Unit<kBytes> {
    static constexpr int in = 1, out = 1;
    char value;
    __device__ void load(const char* at) { value = *at; }
    __device__ void store(char* at) const { *at = value; }
};
template <int cast> struct Narrowed {  // 8 floats of 32 bits to 8 of 16
    static constexpr int in = 32, out = 16;
    float4 low, high;
    __device__ void load(const char* at) {
        low = reinterpret_cast<const float4*>(at)[0];
        high = reinterpret_cast<const float4*>(at)[1];
    }
    __device__ void store(char* at) const {
        *reinterpret_cast<uint4*>(at) =
            make_uint4(narrowed<cast>(low.x, low.y), narrowed<cast>(low.z, low.w), narrowed<cast>(high.x, high.y),
                       narrowed<cast>(high.z, high.w));
    }
};
template <int cast> struct One {  // a float that lies anywhere
    static constexpr int in = 4, out = 2;
    float value;
    __device__ void load(const char* at) { value = *reinterpret_cast<const float*>(at); }
    __device__ void store(char* at) const {
        *reinterpret_cast<unsigned short*>(at) = (unsigned short)narrowed<cast>(value, 0.0f);
    }
};
template <> struct Unit<kFloatToBfloat16> : Narrowed<kToBfloat16> {};
template <> struct Unit<kFloatToHalf> : Narrowed<kToHalf> {};
template <> struct Unit<kOneToBfloat16> : One<kToBfloat16> {};
template <> struct Unit<kOneToHalf> : One<kToHalf> {};

template <int kind> __device__ void copy_tile(const Piece& piece, long long first) {
    Unit<kind> units[kUnroll];
    char* to[kUnroll];
    const long long count = piece.units * piece.rows;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
        const long long unit = first + i * kThreads + threadIdx.x;
        to[i] = nullptr;
        if (unit < count) {
            const long long row = piece.rows == 1 ? 0 : unit / piece.units, column = unit - row * piece.units;
            units[i].load(reinterpret_cast<const char*>(piece.src) + row * piece.src_pitch +
                          column * Unit<kind>::in);
            to[i] = reinterpret_cast<char*>(piece.dst) + row * piece.dst_pitch + column * Unit<kind>::out;
        }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
        if (to[i] != nullptr) units[i].store(to[i]);
    }
}

// One-dimensional grid of kThreads threads; `pieces` in ascending order of first_tile, which starts at 0.
extern "C" __global__ void __launch_bounds__(kThreads)
    copy_pieces(const Piece* pieces, long long count, long long tiles) {
    for (long long tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        long long low = 0, high = count;  // the last piece that starts at this tile or before
        while (high - low > 1) {
            const long long middle = (low + high) / 2;
            (pieces[middle].first_tile <= tile ? low : high) = middle;
        }
        const Piece piece = pieces[low];
        const long long first = (tile - piece.first_tile) * kTile;
        switch (piece.kind) {
            case kVectors: copy_tile<kVectors>(piece, first); break;
            case kBytes: copy_tile<kBytes>(piece, first); break;
            case kFloatToBfloat16: copy_tile<kFloatToBfloat16>(piece, first); break;
            case kFloatToHalf: copy_tile<kFloatToHalf>(piece, first); break;
            case kOneToBfloat16: copy_tile<kOneToBfloat16>(piece, first); break;
            case kOneToHalf: copy_tile<kOneToHalf>(piece, first); break;
        }
    }
}
