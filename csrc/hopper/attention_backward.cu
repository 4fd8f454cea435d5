// The backward of causal attention for Hopper (sm_90a), head size 64: it computes the same as the split form of kernels/attention_backward.py.
//
//   S = scale q k^T,  P = exp(S - lse),  dv = P^T do,  dP = do v^T,  dS = P (dP - delta),  dq = scale dS k,  dk = scale dS^T q
//   delta = the sum of do * out over a row
//
// From the outside in:
//
// - There are two kernels, one for dq and one for dk and dv, and no atomics, so the bits are always the same. Both compute S and dP, seven
//   products instead of five. In return, no tile of dq goes to the L2 cache and back at every step, and groups of warps exchange no data.
// - A block has two groups of four warps that compute, and a warp that copies, with the tensor memory accelerator, continuing from one
//   (head, tile) to the next. It takes the next one from a counter in memory. Among a few heads, whose rows the L2 cache can hold, the
//   longest tiles come first.
// - A group owns 64 rows, of q and do for dq, of k and v for dk and dv, and loops over tiles of the others. For dk and dv it computes S^T, so
//   that P and dS stay in its registers, as left operands of the next products. A tile has one layout in shared memory for both of its
//   products: one reads it directly, the other transposed by the instruction's descriptor.
// - The groups are not synchronised, so one's products can run while the other computes exponentials. Within a group, P's product runs while
//   dS is computed.
//
// Measured on an H100 at 64 x 1024 x 12 heads, microseconds: dq 345, dk and dv 429; Triton's kernels 420 and 643. It seems to be bound by the
// products: leaving out three quarters of those of S and dP saved 17 %, leaving out the exponentials 6 %, all copies of tiles 2 %, and some
// instructions before each product nothing. Starting the next tile's S before this one's dS saved nothing either, and spilled registers.
// Products of 128 columns (there is room for S and dP of dq) are the next thing to try.
//
// Keeping the left operands of S and dP in registers was not timed: ptxas 13.0 gave their registers to P and dS in the same loop, and did not
// restore them.
//
// Sources: Dao, "FlashAttention-2", 2023; Shah et al., "FlashAttention-3", 2024 (products and exponentials in turns).
#include <algorithm>

#include "hopper/attention_backward.h"
#include "hopper/hopper.h"
#include "on_device.h"

namespace ngf {
namespace {

constexpr int D = 64, ROWS = 64;                // head size, rows of a group: a tile of 64 x 64 is 8 KB, in rows of 128 swizzled bytes
constexpr int GROUPS = 2, BLOCK_ROWS = GROUPS * ROWS;
constexpr int TILE_BYTES = 2 * ROWS * D, TERMS_BYTES = 8 * ROWS;
constexpr int STAGES = 4;                       // pairs of tiles in the queue
constexpr int OWN = 3 * GROUPS;                 // tiles of the groups' own rows: q, do and out, or k and v; double-buffered
constexpr int OUT = 2 * GROUPS;                 // tiles of results
constexpr int BARRIERS = 2 * STAGES + 4;
constexpr int SHARED = (2 * STAGES + 2 * OWN + OUT) * TILE_BYTES + STAGES * TERMS_BYTES + 8 * BARRIERS + 8 + 1024;     // with room for alignment
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr int HEADS = 12;                       // heads whose tiles are processed together
constexpr float NOT_THERE = 1e30f;

// ------------------------------------------------------------------------------------------------------------------------ products

#define O4(a, i) OUTPUT(a[i]), OUTPUT(a[i + 1]), OUTPUT(a[i + 2]), OUTPUT(a[i + 3])
#define O32(a) O4(a, 0), O4(a, 4), O4(a, 8), O4(a, 12), O4(a, 16), O4(a, 20), O4(a, 24), O4(a, 28)
#define WGMMA(TYPE, REST, ...)                                                                                                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                                                     \
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"      \
                 "%30,%31}, " REST ";" : O32(sums) : __VA_ARGS__)

// A thread's elements 4j .. 4j + 3 of sums (64 x 64, of the group) are in columns 8j + 2 (lane % 4) and the next; the first two in row
// 16 warp + lane / 4, the last two eight rows below.

// sums = a b^T, or sums += a b^T where ADD; a and b 64 x 16, in shared memory.
template <typename T, bool ADD> __device__ __forceinline__ void multiply(float (&sums)[32], uint64_t a, uint64_t b) {
    constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
#define OUTPUT(x) "+f"(x)
    if constexpr (bf16 && ADD) WGMMA("bf16", "%32, %33, 1, 1, 1, 0, 0", "l"(a), "l"(b));
    if constexpr (!bf16 && ADD) WGMMA("f16", "%32, %33, 1, 1, 1, 0, 0", "l"(a), "l"(b));
#undef OUTPUT
#define OUTPUT(x) "=f"(x)
    if constexpr (bf16 && !ADD) WGMMA("bf16", "%32, %33, 0, 1, 1, 0, 0", "l"(a), "l"(b));
    if constexpr (!bf16 && !ADD) WGMMA("f16", "%32, %33, 0, 1, 1, 0, 0", "l"(a), "l"(b));
#undef OUTPUT
}

// sums += a b; a 64 x 16, in registers, b 16 x 64, in shared memory.
template <typename T> __device__ __forceinline__ void multiply(float (&sums)[32], const uint32_t (&a)[4], uint64_t b) {
#define OUTPUT(x) "+f"(x)
    if constexpr (std::is_same_v<T, __nv_bfloat16>) WGMMA("bf16", "{%32,%33,%34,%35}, %36, 1, 1, 1, 1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else WGMMA("f16", "{%32,%33,%34,%35}, %36, 1, 1, 1, 1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#undef OUTPUT
}

// The lower half of a tile's descriptor (hopper.h, `operand`). One addition gives the next part's, whereas a whole descriptor takes seven
// dependent instructions, beside products of 32 cycles. A tile's address is a multiple of 1,024.
__device__ __forceinline__ uint32_t tile_at(uint32_t address) { return address >> 4 | 1 << 16; }
constexpr uint32_t NEXT_COLUMNS = 32 >> 4, NEXT_ROWS = 16 * 128 >> 4, NEXT_TILE = TILE_BYTES >> 4;     // to the next 16 columns, 16 rows, tile

__device__ __forceinline__ uint64_t operand_at(uint32_t tile) {
    uint64_t whole;
    asm("mov.b64 %0, {%1, %2};" : "=l"(whole) : "r"(tile), "r"(1024 >> 4 | 1 << 30));
    return whole;
}

// sums = a b^T, of two tiles of 64 x 64.
template <typename T> __device__ __forceinline__ void product_of_rows(float (&sums)[32], uint32_t a, uint32_t b) {
    products_begin();
    multiply<T, false>(sums, operand_at(a), operand_at(b));
#pragma unroll
    for (int k = 1; k < D / 16; ++k) multiply<T, true>(sums, operand_at(a + k * NEXT_COLUMNS), operand_at(b + k * NEXT_COLUMNS));
    products_commit();
}

// sums += a b, a in registers, b a tile.
template <typename T> __device__ __forceinline__ void add_product(float (&sums)[32], const uint32_t (&a)[4][4], uint32_t b) {
    products_begin();
#pragma unroll
    for (int k = 0; k < ROWS / 16; ++k) multiply<T>(sums, a[k], operand_at(b + k * NEXT_ROWS));
    products_commit();
}

// A compiler barrier for the sums: it moves no read or write of them across.
__device__ __forceinline__ void settled(float (&sums)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(sums[i]));
}

// Rounds the sums of a product to the left operand of the next.
template <typename T> __device__ __forceinline__ void round_to(uint32_t (&a)[4][4], const float (&sums)[32]) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[k][i] = pack<T>(sums[8 * k + 2 * i], sums[8 * k + 2 * i + 1]);
}

// ------------------------------------------------------------------------------------------------------------- shared by both kernels

// Tells the compiler that `n` is the same in all lanes: it serialises products in code where warps might diverge.
__device__ __forceinline__ int same_in_warp(int n) { return __shfl_sync(0xFFFFFFFFu, n, 0); }

struct Shared {     // addresses
    uint32_t stages, own, out, terms, full, empty, own_full, own_empty, which;
    __device__ explicit Shared(const char* memory) {
        stages = (shared_address(memory) + 1023) & ~1023u;
        own = stages + 2 * STAGES * TILE_BYTES;
        out = own + 2 * OWN * TILE_BYTES;
        terms = out + OUT * TILE_BYTES;
        full = terms + STAGES * TERMS_BYTES;
        empty = full + 8 * STAGES;
        own_full = empty + 8 * STAGES;
        own_empty = own_full + 16;
        which = own_empty + 16;
    }
};

// Number `n` in the order of (head, tile of 128 rows): HEADS heads at a time, and of their tiles the longest loops first.
struct Taken {
    int head, tile;
    __device__ Taken(int n, int heads, int tiles, bool last_is_longest) {
        const int first = n / (HEADS * tiles) * HEADS, together = min(HEADS, heads - first), rest = n % (HEADS * tiles);
        head = first + rest % together;
        tile = last_is_longest ? tiles - 1 - rest / together : rest / together;
    }
};

__device__ __forceinline__ void prepare(const Shared& shared) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < BARRIERS; ++i)      // arrivals: full, the copies; empty, one per computing warp
            barrier_init(shared.full + 8 * i, i < STAGES || i / 2 == STAGES ? 1 : 4 * GROUPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
}

// Takes the next number from the counter and passes it to the groups; -1 where all are taken. `round`: the count of earlier calls.
__device__ __forceinline__ int take(const Shared& shared, int* taken, int count, uint32_t round, int bytes) {
    int n = atomicAdd(taken, 1);
    if (n >= count) n = -1;
    const uint32_t half = round % 2;
    barrier_wait(shared.own_empty + 8 * half, (round / 2 + 1) & 1);
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(shared.which + 4 * half), "r"(n) : "memory");
    if (n >= 0) barrier_expect(shared.own_full + 8 * half, bytes);
    else barrier_arrive(shared.own_full + 8 * half);
    return n;
}

__device__ __forceinline__ int which_one(const Shared& shared, uint32_t round) {
    int n;
    barrier_wait(shared.own_full + 8 * (round % 2), round / 2 & 1);
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(n) : "r"(shared.which + 4 * (round % 2)) : "memory");
    return n;
}

// The address of this lane's row and 16 bytes in a 16 x 16 part of a tile of 64 x 64; for part k it is the address ^ 32 k.
__device__ __forceinline__ uint32_t place(uint32_t tile, int warp, int lane) {
    return tile + (16 * warp + lane % 16) * 128 + (lane / 16 ^ lane % 8) * 16;
}

template <typename T> __device__ __forceinline__ void store_sums(uint32_t address, const float (&sums)[32], float scale) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        uint32_t r[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) r[i] = pack<T>(sums[8 * k + 2 * i] * scale, sums[8 * k + 2 * i + 1] * scale);
        store_blocks(address ^ 32 * k, r);
    }
}

// Releases a stage that this group does not need.
__device__ __forceinline__ void pass(const Shared& shared, uint32_t turn, int lane) {
    barrier_wait(shared.full + 8 * (turn % STAGES), turn / STAGES & 1);
    if (lane == 0) barrier_arrive(shared.empty + 8 * (turn % STAGES));
}

__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" :: "r"(group + 1) : "memory"); }

// --------------------------------------------------------------------------------------------------------------------------- dq

template <typename T> __global__ void __launch_bounds__(THREADS, 1)
dq_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
          const __grid_constant__ CUtensorMap grad_map, const __grid_constant__ CUtensorMap out_map, const __grid_constant__ CUtensorMap dq_map,
          const AttentionBackward call) {
    extern __shared__ char memory[];
    const Shared shared(memory);
    const int group = same_in_warp(threadIdx.x / 128), warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const int heads = call.B * call.H, tiles = (call.T + BLOCK_ROWS - 1) / BLOCK_ROWS;
    prepare(shared);

    if (group == GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp > 0 || lane > 0) return;
        uint32_t turn = 0;
        for (uint32_t round = 0;; ++round) {
            const int n = take(shared, call.taken, heads * tiles, round, OWN * TILE_BYTES);
            if (n < 0) break;
            const Taken it(n, heads, tiles, true);
            const int b = it.head / call.H, h = it.head % call.H, first = it.tile * BLOCK_ROWS;
            for (int i = 0; i < GROUPS; ++i) {
                const uint32_t to = shared.own + (round % 2 * OWN + 3 * i) * TILE_BYTES, barrier = shared.own_full + 8 * (round % 2);
                load_rows(to, &q_map, h, first + i * ROWS, b, barrier);
                load_rows(to + TILE_BYTES, &grad_map, h, first + i * ROWS, b, barrier);
                load_rows(to + 2 * TILE_BYTES, &out_map, h, first + i * ROWS, b, barrier);
            }
            for (int key = 0; key < first + BLOCK_ROWS; key += ROWS, ++turn) {
                const uint32_t stage = turn % STAGES, to = shared.stages + 2 * stage * TILE_BYTES, barrier = shared.full + 8 * stage;
                barrier_wait(shared.empty + 8 * stage, (turn / STAGES + 1) & 1);
                barrier_expect(barrier, 2 * TILE_BYTES);
                load_rows(to, &k_map, h, key, b, barrier);
                load_rows(to + TILE_BYTES, &v_map, h, key, b, barrier);
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const float scale2 = call.scale2;
    uint32_t turn = 0;
    for (uint32_t round = 0;; ++round) {
        const int n = which_one(shared, round);
        if (n < 0) break;
        const Taken it(n, heads, tiles, true);
        const int row = it.tile * BLOCK_ROWS + group * ROWS + 16 * warp + lane / 4;         // and the one eight rows below
        float lse[2], delta[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 2; ++i)
            lse[i] = row + 8 * i < call.T ? call.lse[static_cast<int64_t>(it.head) * call.T + row + 8 * i] : NOT_THERE;

        const uint32_t own = shared.own + (round % 2 * OWN + 3 * group) * TILE_BYTES, q = tile_at(own), grad = q + NEXT_TILE;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t grads[4], outs[4];
            load_blocks(place(own + TILE_BYTES, warp, lane) ^ 32 * k, grads);
            load_blocks(place(own + 2 * TILE_BYTES, warp, lane) ^ 32 * k, outs);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 a = unpack<T>(grads[i]), b = unpack<T>(outs[i]);
                delta[i % 2] = fmaf(a.x, b.x, fmaf(a.y, b.y, delta[i % 2]));
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            delta[i] += __shfl_xor_sync(0xFFFFFFFFu, delta[i], 1);
            delta[i] += __shfl_xor_sync(0xFFFFFFFFu, delta[i], 2);
            // Two queries' lse, then their deltas, since the threads of dk and dv have pairs of queries.
            float* to = call.terms + 2 * (static_cast<int64_t>(it.head) * tiles * BLOCK_ROWS + (row + 8 * i) / 2 * 2) + row % 2;
            if (lane % 4 == 0) to[0] = lse[i], to[2] = delta[i];
        }

        float dq[32];
#pragma unroll
        for (int i = 0; i < 32; ++i) dq[i] = 0.0f;
        const int diagonal = it.tile * GROUPS + group;
        for (int tile = 0; tile <= diagonal; ++tile, ++turn) {
            const uint32_t stage = turn % STAGES, k = tile_at(shared.stages) + stage * 2 * NEXT_TILE, v = k + NEXT_TILE;
            barrier_wait(shared.full + 8 * stage, turn / STAGES & 1);
            float s[32], dp[32];
            product_of_rows<T>(s, q, k);
            product_of_rows<T>(dp, grad, v);
            products_wait<1>();
            settled(s);
            if (tile > 0 && lane == 0) barrier_arrive(shared.empty + 8 * ((turn + STAGES - 1) % STAGES));       // dq's last product is done
#pragma unroll
            for (int i = 0; i < 32; ++i) s[i] = exp2_fast(fmaf(s[i], scale2, -lse[i % 4 / 2]));
            if (tile == diagonal) {
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    if (i / 4 * 8 + lane % 4 * 2 + i % 2 > 16 * warp + lane / 4 + i % 4 / 2 * 8) s[i] = 0.0f;
            }
            products_wait<0>();
            settled(dp);
            uint32_t ds[4][4];
#pragma unroll
            for (int i = 0; i < 32; ++i) s[i] *= dp[i] - delta[i % 4 / 2];
            round_to<T>(ds, s);
            add_product<T>(dq, ds, k);
        }
        products_wait<0>();
        settled(dq);
        if (lane == 0) barrier_arrive(shared.empty + 8 * ((turn + STAGES - 1) % STAGES)), barrier_arrive(shared.own_empty + 8 * (round % 2));
        for (int tile = diagonal + 1; tile < (it.tile + 1) * GROUPS; ++tile, ++turn) pass(shared, turn, lane);      // the other group's keys

        if (warp == 0 && lane == 0) wait_until_stores_have_read();
        group_sync(group);
        const uint32_t to = shared.out + group * TILE_BYTES;
        store_sums<T>(place(to, warp, lane), dq, call.scale);
        fence_before_copies();
        group_sync(group);
        if (warp == 0 && lane == 0)
            store_rows(&dq_map, it.head % call.H, it.tile * BLOCK_ROWS + group * ROWS, it.head / call.H, to);
    }
    if (warp == 0 && lane == 0) wait_until_stores_have_read();
}

// ------------------------------------------------------------------------------------------------------------------------ dk and dv

template <typename T> __global__ void __launch_bounds__(THREADS, 1)
dkdv_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
            const __grid_constant__ CUtensorMap grad_map, const __grid_constant__ CUtensorMap dk_map, const __grid_constant__ CUtensorMap dv_map,
            const AttentionBackward call) {
    extern __shared__ char memory[];
    const Shared shared(memory);
    const int group = same_in_warp(threadIdx.x / 128), warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const int heads = call.B * call.H, tiles = (call.T + BLOCK_ROWS - 1) / BLOCK_ROWS, query_tiles = (call.T + ROWS - 1) / ROWS;
    prepare(shared);

    if (group == GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp > 0 || lane > 0) return;
        uint32_t turn = 0;
        for (uint32_t round = 0;; ++round) {
            const int n = take(shared, call.taken + 1, heads * tiles, round, 2 * GROUPS * TILE_BYTES);
            if (n < 0) break;
            const Taken it(n, heads, tiles, false);
            const int b = it.head / call.H, h = it.head % call.H;
            for (int i = 0; i < GROUPS; ++i) {
                const uint32_t to = shared.own + (round % 2 * OWN + 2 * i) * TILE_BYTES, barrier = shared.own_full + 8 * (round % 2);
                const int key = it.tile * BLOCK_ROWS + i * ROWS;
                load_rows(to, &k_map, h, key, b, barrier);
                load_rows(to + TILE_BYTES, &v_map, h, key, b, barrier);
            }
            const float* terms = call.terms + 2 * static_cast<int64_t>(it.head) * tiles * BLOCK_ROWS;
            for (int tile = it.tile * GROUPS; tile < query_tiles; ++tile, ++turn) {
                const uint32_t stage = turn % STAGES, to = shared.stages + 2 * stage * TILE_BYTES, barrier = shared.full + 8 * stage;
                barrier_wait(shared.empty + 8 * stage, (turn / STAGES + 1) & 1);
                barrier_expect(barrier, 2 * TILE_BYTES + TERMS_BYTES);
                load_rows(to, &q_map, h, tile * ROWS, b, barrier);
                load_rows(to + TILE_BYTES, &grad_map, h, tile * ROWS, b, barrier);
                load_run(shared.terms + stage * TERMS_BYTES, terms + 2 * tile * ROWS, TERMS_BYTES, barrier);
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const float scale2 = call.scale2;
    uint32_t turn = 0;
    for (uint32_t round = 0;; ++round) {
        const int n = which_one(shared, round);
        if (n < 0) break;
        const Taken it(n, heads, tiles, false);
        const uint32_t k = tile_at(shared.own) + (round % 2 * OWN + 2 * group) * NEXT_TILE, v = k + NEXT_TILE;
        float dk[32], dv[32];
#pragma unroll
        for (int i = 0; i < 32; ++i) dk[i] = dv[i] = 0.0f;
        const int diagonal = it.tile * GROUPS + group;
        for (int tile = it.tile * GROUPS; tile < min(diagonal, query_tiles); ++tile, ++turn) pass(shared, turn, lane);    // queries that see none of its keys
        for (int tile = diagonal; tile < query_tiles; ++tile, ++turn) {
            const uint32_t stage = turn % STAGES, q = tile_at(shared.stages) + stage * 2 * NEXT_TILE, grad = q + NEXT_TILE;
            barrier_wait(shared.full + 8 * stage, turn / STAGES & 1);
            float s[32], dp[32], lse[16], delta[16];
            product_of_rows<T>(s, k, q);
            product_of_rows<T>(dp, v, grad);
            const uint32_t terms = shared.terms + stage * TERMS_BYTES + lane % 4 * 16;
#pragma unroll
            for (int j = 0; j < 8; ++j)
                asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(lse[2 * j]), "=f"(lse[2 * j + 1]), "=f"(delta[2 * j]), "=f"(delta[2 * j + 1])
                             : "r"(terms + 64 * j) : "memory");
            products_wait<1>();
            settled(s);
            if (tile > diagonal && lane == 0) barrier_arrive(shared.empty + 8 * ((turn + STAGES - 1) % STAGES));    // dk's last product is done
#pragma unroll
            for (int i = 0; i < 32; ++i) s[i] = exp2_fast(fmaf(s[i], scale2, -lse[i / 4 * 2 + i % 2]));
            if (tile == diagonal) {
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    if (i / 4 * 8 + lane % 4 * 2 + i % 2 < 16 * warp + lane / 4 + i % 4 / 2 * 8) s[i] = 0.0f;
            }
            uint32_t p[4][4], ds[4][4];
            round_to<T>(p, s);
            add_product<T>(dv, p, grad);
            products_wait<1>();
            settled(dp);
#pragma unroll
            for (int i = 0; i < 32; ++i) s[i] *= dp[i] - delta[i / 4 * 2 + i % 2];
            round_to<T>(ds, s);
            add_product<T>(dk, ds, q);
        }
        products_wait<0>();
        settled(dk);
        settled(dv);
        if (diagonal < query_tiles && lane == 0) barrier_arrive(shared.empty + 8 * ((turn + STAGES - 1) % STAGES));
        if (lane == 0) barrier_arrive(shared.own_empty + 8 * (round % 2));

        if (warp == 0 && lane == 0) wait_until_stores_have_read();
        group_sync(group);
        const uint32_t to = shared.out + 2 * group * TILE_BYTES;
        store_sums<T>(place(to, warp, lane), dk, call.scale);
        store_sums<T>(place(to + TILE_BYTES, warp, lane), dv, 1.0f);
        fence_before_copies();
        group_sync(group);
        if (warp == 0 && lane == 0) {
            const int h = it.head % call.H, key = it.tile * BLOCK_ROWS + group * ROWS, b = it.head / call.H;
            store_rows(&dk_map, h, key, b, to);
            store_rows(&dv_map, h, key, b, to + TILE_BYTES);
        }
    }
    if (warp == 0 && lane == 0) wait_until_stores_have_read();
}

// ------------------------------------------------------------------------------------------------------------------- the launcher

template <typename T> void launch(const AttentionBackward& call, int device, cudaStream_t stream) {
    const auto map_of = [&](const Heads& x) {
        CUtensorMap map;
        describe<4>(&map, call.bf16, x.data, {D, call.H, call.T, call.B}, {x.stride_h, x.stride_t, x.stride_b}, {D, 1, ROWS, 1});
        return map;
    };
    const CUtensorMap q = map_of(call.q), k = map_of(call.k), v = map_of(call.v), grad = map_of(call.grad);
    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    const int blocks = std::min<int64_t>(multiprocessors, int64_t{call.B} * call.H * ((call.T + BLOCK_ROWS - 1) / BLOCK_ROWS));
    for (const void* kernel : {reinterpret_cast<const void*>(dq_kernel<T>), reinterpret_cast<const void*>(dkdv_kernel<T>)})
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED), "asking for shared memory");
    check(cudaMemsetAsync(call.taken, 0, 2 * sizeof(int), stream), "cudaMemsetAsync");
    dq_kernel<T><<<blocks, THREADS, SHARED, stream>>>(q, k, v, grad, map_of(call.out), map_of(call.dq), call);
    check(cudaGetLastError(), "launching attention's backward, dq");
    dkdv_kernel<T><<<blocks, THREADS, SHARED, stream>>>(q, k, v, grad, map_of(call.dk), map_of(call.dv), call);
    check(cudaGetLastError(), "launching attention's backward, dk and dv");
}

}  // namespace

void attention_backward_sm90(const AttentionBackward& call, int device, void* stream) {
    if (call.B == 0 || call.T == 0 || call.H == 0) return;
    const OnDevice here(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    call.bf16 ? launch<__nv_bfloat16>(call, device, queue) : launch<__half>(call, device, queue);
}

}  // namespace ngf
