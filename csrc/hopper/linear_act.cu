// The matmul of the GELU-MLP with the activation in its epilogue, for Hopper (sm_90a): it computes the same as `linear_act` and
// `linear_dact` of kernels/mlp.py, in little more time than the matmul alone takes.
//
//   forward     h = a b^T + bias,  out = act(h)      a (M, K), b (N, K)      also writes h, where a backward follows
//   backward    out = (a b) * act'(h)                a (M, K), b (K, N)      also sums out's columns, for the bias's gradient
//
// From the outside in:
//
// - Ping-pong. A block has three groups of four warps. One group copies. The other two own an output tile each: while one computes
//   activations, which takes as long as a main loop at K = 768, the other's products keep the tensor cores busy. Operands arrive in one
//   queue, alternating between the two groups' tiles, so the groups take turns without further synchronisation.
// - A cluster of two blocks, one below the other, shares b: each block copies half of b's tile, to both blocks. A tile of 128 x 192 then
//   reads 344 KB from the L2 cache at K = 768. Single 128 x 128 tiles would read 1.7 times as much for the same work, more than L2 delivers.
// - The tensor memory accelerator does all copies, through swizzled shared memory without bank conflicts. It also drops what is outside of
//   a matrix, so no masks are computed.
// - Blocks are persistent and loop over tiles, so the queue does not run empty between tiles.
// - While a group computes activations, the registers of its sums become free one by one, and the compiler needs them: an activation is a
//   chain of about twelve dependent instructions, and only many chains side by side hide their latency. So the sums are set to zero before a
//   main loop; if its first product overwrote them instead, the compiler would consider them live until then.
//
// The activation is applied to h before h is rounded (kernels/mlp.py says why). Every sum has a fixed order, so the bits are always the same.
//
// Measured on an H100 at 65,536 x 768 x 3,072, microseconds: forward 544, backward 567. cuBLAS's matmul alone takes 429 forward; with a kernel
// for the activation after it, 698 and 874. benchmarks/results/h100.jsonl has the medians, docs/gpu.md all sizes and later changes.
//
// Sources: the schedule is CUTLASS 3's ping-pong schedule; the tail of erf is a polynomial for its logarithm, fitted here.
#include <array>

#include "hopper/hopper.h"
#include "hopper/linear_act.h"
#include "on_device.h"

namespace ngf {
namespace {

constexpr int BM = 128, BN = 192, BK = 64;      // a group's tile; 64 elements of half precision are the 128 bytes of a swizzled row
constexpr int CLUSTER = 2;                      // blocks that share tiles of b; their own tiles are below each other
constexpr int STAGES = 4;                       // tiles of operands in the queue
constexpr int SLICE = 64, SLICES = BN / SLICE;  // columns of a tile that are stored (in the backward also loaded) at a time
constexpr int SLOTS = 2;                        // slices in shared memory, for each of the two groups
constexpr int A_BYTES = 2 * BM * BK, B_BYTES = 2 * BN * BK, STAGE_BYTES = A_BYTES + B_BYTES, SLICE_BYTES = 2 * BM * SLICE;
constexpr int BARRIERS = 2 * STAGES + 2 * SLOTS + 2;
constexpr int SHARED = STAGES * STAGE_BYTES + 2 * SLOTS * SLICE_BYTES + 8 * BARRIERS + 1024;    // with room for alignment
constexpr int THREADS = 384, COPIES = 2;        // group COPIES copies, groups 0 and 1 compute

enum Activation { GELU, GELU_TANH };

// The four warps of a group write a slice and go on; a warp of the copying group waits for them and stores it.
__device__ __forceinline__ void slice_is_written(int slot) { asm volatile("bar.arrive %0, 160;" :: "r"(slot + 1) : "memory"); }
__device__ __forceinline__ void wait_for_slice(int slot) { asm volatile("bar.sync %0, 160;" :: "r"(slot + 1) : "memory"); }

#define R4(a, i) "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3])
#define R16(a, i) R4(a, i), R4(a, i + 4), R4(a, i + 8), R4(a, i + 12)
#define R96(a) R16(a, 0), R16(a, 16), R16(a, 32), R16(a, 48), R16(a, 64), R16(a, 80)
#define WGMMA(TYPE, B_IS_KN)                                                                                                                  \
    asm volatile("{\n"                                                                                                               \
                 "wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE " {"                                                    \
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"     \
                 "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,"   \
                 "%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,"   \
                 "%86,%87,%88,%89,%90,%91,%92,%93,%94,%95}, %96, %97, 1, 1, 1, 0, " B_IS_KN ";\n}"                                            \
                 : R96(sums) : "l"(a), "l"(b))

// sums (64 x 192, of the group) += a (64 x 16) b, b^T (192 x 16), or b (16 x 192) where B_IS_KN. A thread's elements 4j .. 4j+3 are in
// columns 8j + 2 (lane % 4) and the next; the first two in row 16 warp + lane / 4, the last two eight rows below.
template <typename T, bool B_IS_KN> __device__ __forceinline__ void multiply(float (&sums)[96], uint64_t a, uint64_t b) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        if constexpr (B_IS_KN) WGMMA("bf16", "1"); else WGMMA("bf16", "0");
    } else {
        if constexpr (B_IS_KN) WGMMA("f16", "1"); else WGMMA("f16", "0");
    }
}

// ----------------------------------------------------------------------------------------------------------------- the activation

__device__ __forceinline__ float inverse_fast(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// These two keep NaN, which fminf and fmaxf drop.
__device__ __forceinline__ float minimum(float a, float b) { float y; asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b)); return y; }
__device__ __forceinline__ float maximum(float a, float b) { float y; asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b)); return y; }

constexpr float LOG2_E = 1.4426950408889634f, INV_SQRT_2PI = 0.3989422804014327f, SQRT_2_OVER_PI = 0.7978845608028654f, CUBIC = 0.044715f;

template <Activation ACTIVATION> __device__ __forceinline__ float activation(float x) {
    if (ACTIVATION == GELU) {
        // x Phi(x) = max(x, 0) - |x| Phi(-|x|), with a polynomial for log2 Phi(-a) that is fitted to a from 0 to 7. Its relative error in Phi is
        // 4e-6 up to a = 4 and 4e-5 up to 5.5; half precision rounds by 5e-4 or more. Beyond, it keeps falling: at 16 Phi is 0.
        const float a = minimum(fabsf(x), 16.0f);
        float p = fmaf(a, -1.67135073e-6f, 5.88057756e-5f);
        p = fmaf(a, p, -9.12256348e-4f);
        p = fmaf(a, p, 8.4502568e-3f);
        p = fmaf(a, p, -5.38696004e-2f);
        p = fmaf(a, p, -0.458529623f);
        p = fmaf(a, p, -1.15123415f);
        p = fmaf(a, p, -0.999995972f);
        return fmaf(-a, exp2_fast(p), maximum(x, 0.0f));
    }
    const float z = SQRT_2_OVER_PI * x * fmaf(CUBIC, x * x, 1.0f);
    const float e = exp2_fast(fabsf(z) * (-2.0f * LOG2_E)), r = inverse_fast(1.0f + e);
    return x * (z > 0.0f ? r : e * r);
}

// act'(x), with the formulas of kernels/mlp.py.
template <Activation ACTIVATION> __device__ __forceinline__ float slope(float x) {
    if (ACTIVATION == GELU) {
        const float e = exp2_fast(x * x * (-0.5f * LOG2_E));
        const float t = inverse_fast(fmaf(fabsf(x), 0.3275911f * 0.7071067811865476f, 1.0f));
        float sum = fmaf(t, 0.5f * 1.061405429f, -0.5f * 1.453152027f);
        sum = fmaf(t, sum, 0.5f * 1.421413741f);
        sum = fmaf(t, sum, -0.5f * 0.284496736f);
        sum = fmaf(t, sum, 0.5f * 0.254829592f);
        const float tail = t * sum * e;
        return fmaf(x * e, INV_SQRT_2PI, x > 0.0f ? 1.0f - tail : tail);
    }
    const float square = x * x, z = SQRT_2_OVER_PI * x * fmaf(CUBIC, square, 1.0f);
    const float e = exp2_fast(fabsf(z) * (-2.0f * LOG2_E)), r = inverse_fast(1.0f + e);
    return fmaf(2.0f * x * (e * r * r), SQRT_2_OVER_PI * fmaf(3.0f * CUBIC, square, 1.0f), z > 0.0f ? r : e * r);
}

// --------------------------------------------------------------------------------------------------------------------- the kernel

// The positions of output tiles. They are numbered in pairs, one tile for each block of the cluster, along a row first, so that b, which every
// row reads again, stays in the L2 cache.
struct Tiles {
    int wide, pairs, rank;
    __device__ Tiles(const LinearAct& call, int rank)
        : wide((call.N + BN - 1) / BN), pairs((call.M + CLUSTER * BM - 1) / (CLUSTER * BM) * wide), rank(rank) {}
    __device__ int row(int pair) const { return (pair / wide * CLUSTER + rank) * BM; }
    __device__ int column(int pair) const { return pair % wide * BN; }
};

template <typename T, Activation ACTIVATION, bool BACKWARD, bool BIASED>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
linear_act_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                  const __grid_constant__ CUtensorMap h_map, const __grid_constant__ CUtensorMap out_map, const LinearAct call) {
    extern __shared__ char memory[];
    const uint32_t stages = (shared_address(memory) + 1023) & ~1023u;
    const uint32_t slots = stages + STAGES * STAGE_BYTES;
    // full: operands have arrived. empty: both blocks have used them. ready: a slot may be written; in the backward, it holds its slice of h.
    const uint32_t full = slots + 2 * SLOTS * SLICE_BYTES, empty = full + 8 * STAGES, ready = empty + 8 * STAGES, turns = ready + 8 * 2 * SLOTS;

    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    if (threadIdx.x == 0) {
        for (int i = 0; i < BARRIERS; ++i)      // arrivals: empty, one per block; turns, one per warp, so that no warp is a round behind
            barrier_init(full + 8 * i, i / STAGES == 1 ? CLUSTER : full + 8 * i >= turns ? 4 : 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();

    const Tiles tiles(call, rank);
    const int clusters = gridDim.x / CLUSTER, first = blockIdx.x / CLUSTER, steps = (call.K + BK - 1) / BK;

    if (group == COPIES) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == 0 && lane == 0) {                       // operands
            uint32_t turn = 0;
            for (int pair = first; pair < tiles.pairs; pair += clusters) {
                const int m = tiles.row(pair), n = tiles.column(pair);
                for (int k = 0; k < steps; ++k, ++turn) {
                    const uint32_t stage = turn % STAGES, a = stages + stage * STAGE_BYTES, b = a + A_BYTES, barrier = full + 8 * stage;
                    barrier_wait(empty + 8 * stage, (turn / STAGES + 1) & 1);
                    barrier_expect(barrier, STAGE_BYTES);
                    load_tile(a, &a_map, k * BK, m, barrier);
                    if (BACKWARD) {                         // b is (K, N): three boxes of 64 columns, half of the rows of each
                        for (int i = 0; i < BN / 64; ++i)
                            load_tile_in_both(b + i * BK * 128 + rank * (BK / 2 * 128), &b_map, n + i * 64, k * BK + rank * (BK / 2), barrier);
                    } else {                                // b is (N, K): half of its rows
                        load_tile_in_both(b + rank * (B_BYTES / 2), &b_map, k * BK, n + rank * (BN / 2), barrier);
                    }
                }
            }
        } else if (warp == 1 || warp == 2) {                // slices, for the group `owner`
            const int owner = warp - 1;
            const uint32_t slot = slots + owner * SLOTS * SLICE_BYTES, barriers = ready + 8 * SLOTS * owner;
            const auto fetch = [&](int pair, int slice, uint32_t at) {
                barrier_expect(barriers + 8 * at, SLICE_BYTES);
                load_tile(slot + at * SLICE_BYTES, &h_map, tiles.column(pair) + slice * SLICE, tiles.row(pair), barriers + 8 * at);
            };
            uint32_t at = 0;
            int pair = first + owner * clusters;
            if (BACKWARD && lane == 0 && pair < tiles.pairs)
                for (int slice = 0; slice < SLOTS; ++slice) fetch(pair, slice, slice);
            for (; pair < tiles.pairs; pair += 2 * clusters)
                for (int slice = 0; slice < SLICES; ++slice)
                    for (int activated = BACKWARD || !call.h; activated < 2; ++activated, at ^= 1) {       // h first, then act(h)
                        __syncwarp();
                        wait_for_slice(SLOTS * owner + at);
                        if (lane == 0) {
                            store_tile(activated ? &out_map : &h_map, tiles.column(pair) + slice * SLICE, tiles.row(pair), slot + at * SLICE_BYTES);
                            wait_until_stores_have_read();
                            const int next = slice + SLOTS < SLICES ? pair : pair + 2 * clusters;
                            if (!BACKWARD) barrier_arrive(barriers + 8 * at);
                            else if (next < tiles.pairs) fetch(next, (slice + SLOTS) % SLICES, at);
                        }
                    }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const uint32_t slot = slots + group * SLOTS * SLICE_BYTES, barriers = ready + 8 * SLOTS * group;
        float sums[2][96];                                  // of the tile's first 64 rows, and of its last
        uint32_t turn = group * steps, done = 0, unit = 0;  // counts steps of both groups; tiles of this group; slices of this group

        for (int pair = first + group * clusters; pair < tiles.pairs; pair += 2 * clusters, turn += steps, ++done) {
#pragma unroll
            for (int i = 0; i < 96; ++i) sums[0][i] = sums[1][i] = 0.0f;
            // Wait until the other group has seen all its operands arrive: a barrier's parity distinguishes only its last two rounds.
            barrier_wait(turns + 8 * group, (done + group + 1) & 1);
            for (int k = 0; k < steps; ++k, ++turn) {
                const uint32_t stage = turn % STAGES, a = stages + stage * STAGE_BYTES, b = a + A_BYTES;
                barrier_wait(full + 8 * stage, turn / STAGES & 1);
                products_begin();
#pragma unroll
                for (int part = 0; part < BK / 16; ++part)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        multiply<T, BACKWARD>(sums[half], operand(a + half * 64 * 128 + part * 32),
                                              BACKWARD ? operand(b + part * 16 * 128, BK * 128) : operand(b + part * 32));
                products_commit();
                if (k > 0) {
                    products_wait<1>();
                    if (warp == 0 && lane < CLUSTER) barrier_arrive_in(empty + 8 * ((turn - 1) % STAGES), lane);
                }
            }
            if (lane == 0) barrier_arrive(turns + 8 * (1 - group));
            products_wait<0>();
            if (warp == 0 && lane < CLUSTER) barrier_arrive_in(empty + 8 * ((turn - 1) % STAGES), lane);
#pragma unroll
            for (int i = 0; i < 96; ++i) asm volatile("" : "+f"(sums[0][i]), "+f"(sums[1][i]));        // keeps the compiler from reading them before the wait

            const int m = tiles.row(pair), n = tiles.column(pair);
            if (BIASED && !BACKWARD) {
#pragma unroll
                for (int i = 0; i < BN / 8; ++i) {
                    const int column = n + 8 * i + lane % 4 * 2;
                    const float2 bias = column < call.N ? *reinterpret_cast<const float2*>(call.bias + column) : float2{0.0f, 0.0f};
#pragma unroll
                    for (int r = 0; r < 8; ++r) sums[r / 4][4 * i + r % 4] += r % 2 ? bias.y : bias.x;
                }
            }
#pragma unroll
            for (int slice = 0; slice < SLICES; ++slice) {
#pragma unroll
                for (int activated = BACKWARD; activated < 2; ++activated) {
                    if (!BACKWARD && !activated && !call.h) continue;
                    const uint32_t at = unit % SLOTS;
                    barrier_wait(barriers + 8 * at, (unit / SLOTS + !BACKWARD) & 1);
                    // This lane's row of a 16 x 16 part: 128 bytes a row, with groups of eight columns swizzled by the row.
                    const uint32_t row = slot + at * SLICE_BYTES + (16 * warp + lane % 16) * 128 + (lane / 16 ^ lane % 8) * 16;
#pragma unroll
                    for (int part = 0; part < SLICE / 16; ++part) {
                        float columns[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const uint32_t address = (row ^ part * 32) + half * 64 * 128;
                            const float* v = sums[half] + (slice * SLICE + part * 16) / 2;
                            uint32_t r[4];
                            if (BACKWARD) load_blocks(address, r);
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                float x = v[2 * i], y = v[2 * i + 1];
                                if (BACKWARD) {
                                    const float2 h = unpack<T>(r[i]);
                                    x *= slope<ACTIVATION>(h.x);
                                    y *= slope<ACTIVATION>(h.y);
                                    columns[i / 2 * 2] += x;
                                    columns[i / 2 * 2 + 1] += y;
                                } else if (activated) {
                                    x = activation<ACTIVATION>(x);
                                    y = activation<ACTIVATION>(y);
                                }
                                r[i] = pack<T>(x, y);
                            }
                            store_blocks(address, r);
                        }
                        if (BACKWARD && BIASED) {
#pragma unroll
                            for (int i = 0; i < 4; ++i)
#pragma unroll
                                for (int distance = 4; distance < 32; distance *= 2)
                                    columns[i] += __shfl_xor_sync(0xFFFFFFFFu, columns[i], distance);
                            const int column = n + slice * SLICE + part * 16 + lane % 4 * 2;
                            float* to = call.column_sums + static_cast<size_t>(m / BM * 4 + warp) * call.N + column;
                            if (lane < 4 && column < call.N && m < call.M) *reinterpret_cast<float2*>(to) = {columns[0], columns[1]};
                            if (lane < 4 && column + 8 < call.N && m < call.M) *reinterpret_cast<float2*>(to + 8) = {columns[2], columns[3]};
                        }
                    }
                    fence_before_copies();
                    slice_is_written(SLOTS * group + at);
                    ++unit;
                }
            }
        }
    }
    __syncwarp();
    cluster_sync();     // so that no block ends while the other may still write to it
}

// ------------------------------------------------------------------------------------------------------------------- the launcher

template <typename T, Activation ACTIVATION, bool BACKWARD, bool BIASED>
void launch(const CUtensorMap (&maps)[4], const LinearAct& call, int device, cudaStream_t stream) {
    const auto kernel = linear_act_kernel<T, ACTIVATION, BACKWARD, BIASED>;
    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED), "asking for shared memory");
    kernel<<<multiprocessors / CLUSTER * CLUSTER, THREADS, SHARED, stream>>>(maps[0], maps[1], maps[2], maps[3], call);
    check(cudaGetLastError(), "launching the MLP's matmul");
}

template <typename T, Activation ACTIVATION>
void launch(const CUtensorMap (&maps)[4], const LinearAct& call, int device, cudaStream_t stream) {
    const bool biased = call.backward ? call.column_sums != nullptr : call.bias != nullptr;
    if (call.backward) biased ? launch<T, ACTIVATION, true, true>(maps, call, device, stream) : launch<T, ACTIVATION, true, false>(maps, call, device, stream);
    else biased ? launch<T, ACTIVATION, false, true>(maps, call, device, stream) : launch<T, ACTIVATION, false, false>(maps, call, device, stream);
}

template <typename T>
void launch(const CUtensorMap (&maps)[4], const LinearAct& call, int device, cudaStream_t stream) {
    call.tanh ? launch<T, GELU_TANH>(maps, call, device, stream) : launch<T, GELU>(maps, call, device, stream);
}

}  // namespace

void linear_act_sm90(const LinearAct& call, int device, void* stream) {
    if (call.M == 0 || call.N == 0) return;
    const OnDevice here(device);
    CUtensorMap maps[4];
    const auto [M, N, K] = std::array{call.M, call.N, call.K};
    describe(&maps[0], call.bf16, call.a, K, M, call.a_stride, BM);
    if (call.backward) describe(&maps[1], call.bf16, call.b, N, K, N, BK / 2);
    else describe(&maps[1], call.bf16, call.b, K, N, K, BN / 2);
    describe(&maps[2], call.bf16, call.h ? call.h : call.out, N, M, N, BM);
    describe(&maps[3], call.bf16, call.out, N, M, N, BM);
    const auto queue = static_cast<cudaStream_t>(stream);
    call.bf16 ? launch<__nv_bfloat16>(maps, call, device, queue) : launch<__half>(maps, call, device, queue);
}

}  // namespace ngf
