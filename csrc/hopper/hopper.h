// Hopper's instructions (sm_90a) as functions: barriers in shared memory, copies by the tensor memory accelerator, half-precision matrices
// between registers and shared memory, and the fences and waits of warpgroup products (wgmma). The products themselves are in the kernels'
// files, which know their shapes.
//
// Sources: PTX ISA, "Asynchronous warpgroup level matrix instructions", "Tensor copies", "mbarrier".
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlfcn.h>
#include <stdint.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace ngf {
namespace {

// ---------------------------------------------------------------------------------------------------------- instructions: barriers

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n.reg .pred done;\n"
                 "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
                 :: "r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// Arrives at the barrier with this address in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_in(uint32_t barrier, uint32_t rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" :: "r"(barrier), "r"(rank) : "memory");
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ------------------------------------------------------------------------------------------------------------ instructions: copies

__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// Copies a tile to address `to` of both blocks of the cluster, and signals the barrier of each block.
__device__ __forceinline__ void load_tile_in_both(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;"
                 :: "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(3)) : "memory");
}

__device__ __forceinline__ void store_tile(const CUtensorMap* map, int column, int row, uint32_t from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];\n"
                 "cp.async.bulk.commit_group;" :: "l"(map), "r"(column), "r"(row), "r"(from) : "memory");
}

// Copies the rows from `row` on of one head of one sequence, from a tensor (batch, tokens, heads, 64) with a map by `describe`.
__device__ __forceinline__ void load_rows(uint32_t to, const CUtensorMap* map, int head, int row, int batch, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];"
                 :: "r"(to), "l"(map), "r"(0), "r"(head), "r"(row), "r"(batch), "r"(barrier) : "memory");
}

__device__ __forceinline__ void store_rows(const CUtensorMap* map, int head, int row, int batch, uint32_t from) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];\n"
                 "cp.async.bulk.commit_group;" :: "l"(map), "r"(0), "r"(head), "r"(row), "r"(batch), "r"(from) : "memory");
}

// Copies `bytes` contiguous bytes, a multiple of 16.
__device__ __forceinline__ void load_run(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_until_stores_have_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Makes this thread's writes to shared memory visible to copies that are started later.
__device__ __forceinline__ void fence_before_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Moves four 8 x 8 blocks in half precision between registers and shared memory; lane i passes the address of row i % 8 of block i / 8.
__device__ __forceinline__ void store_blocks(uint32_t address, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

__device__ __forceinline__ void load_blocks(uint32_t address, uint32_t (&r)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// ---------------------------------------------------------------------------------------------------------- instructions: products

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory"); }

// The descriptor of an operand in rows of 128 swizzled bytes; eight rows are 1,024 bytes. `next`: bytes to the next 64 columns, for an operand
// that is stored as (K, N).
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t next = 16) {
    const uint64_t swizzled = 1;
    return (address & 0x3FFFF) >> 4 | static_cast<uint64_t>(next >> 4) << 16 | static_cast<uint64_t>(1024 >> 4) << 32 | swizzled << 62;
}

template <typename T> __device__ __forceinline__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&v);
}
template <> __device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&v);
}
template <typename T> __device__ __forceinline__ float2 unpack(uint32_t v);
template <> __device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t v) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&v)); }
template <> __device__ __forceinline__ float2 unpack<__half>(uint32_t v) { return __half22float2(*reinterpret_cast<__half2*>(&v)); }

__device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

// --------------------------------------------------------------------------------------------------------------------- on the host

using Encode = decltype(&cuTensorMapEncodeTiled);

// Makes the tensor map for copies of a half-precision tensor whose first dimension is contiguous. `boxes`: the sizes of a copied box, the first
// of them 64, a row of 128 bytes. `strides`: of the other dimensions, in elements.
template <int N>
inline void describe(CUtensorMap* map, bool bf16, const void* data, const int64_t (&sizes)[N], const int64_t (&strides)[N - 1], const int (&boxes)[N]) {
    static const Encode encode = [] {   // looked up by name, since the extension must load without a driver
        void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        return driver ? reinterpret_cast<Encode>(dlsym(driver, "cuTensorMapEncodeTiled")) : nullptr;
    }();
    if (!encode) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; drivers since CUDA 12 have it");
    cuuint64_t size[N], stride[N - 1];
    cuuint32_t box[N], step[N];
    std::string words;
    for (int i = 0; i < N; ++i) {
        size[i] = sizes[i], box[i] = boxes[i], step[i] = 1;
        if (i > 0) stride[i - 1] = 2 * strides[i - 1];
        words += (i ? " x " : "") + std::to_string(sizes[i]) + (i ? " (" + std::to_string(strides[i - 1]) + " apart)" : "");
    }
    if (encode(map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, N, const_cast<void*>(data), size, stride, box,
               step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
        throw std::runtime_error("the CUDA driver rejects a tensor map of " + words + " elements; expected addresses and strides that are multiples of 16 bytes");
}

// The tensor map of a matrix, for boxes of 64 columns.
inline void describe(CUtensorMap* map, bool bf16, const void* data, int64_t columns, int64_t rows, int64_t row_stride, int box_rows) {
    describe<2>(map, bf16, data, {columns, rows}, {row_stride}, {64, box_rows});
}

}  // namespace
}  // namespace ngf
