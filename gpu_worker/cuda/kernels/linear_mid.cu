// y[M, N] = x[M, K] W[N, K]^T for 17 to 64 tokens, bf16 in and out, fp32 sums: linear.cu's idea with the wide matrix unit. Weights
// are again fragments read straight from memory, now of wgmma m64nTOKENSk16 (A from registers); x is staged once in shared memory.
//
// A block has R x S warpgroups: R over groups of 64 rows of W, S over K; a cluster of KS blocks splits K before that. A warp reads
// 16 rows x KW columns of a tile, all its loads in flight; while a chunk is multiplied the next tile's is already asked for.
//
// Fragments: as in linear.cu lane (g, t) reads 16 bytes, row g (and g + 8), columns 8 t .. 8 t + 7 of a chunk of 32; words 2 s, 2 s + 1 are
// the operands of k16 step s. So in step s the unit's columns 2 t, 2 t + 1 are the real 8 t + 4 s + {0, 1}, and 2 t + 8, 2 t + 9 the real
// 8 t + 4 s + {2, 3}. x stands in shared memory in that order: core matrices of 8 tokens x 16 bytes, [chunk][word 0..3][8 tokens].
//
// A block finishes ROWS / KS rows of a tile: every warp sends its sums there (distributed shared memory), and after one barrier of the
// cluster they are added in a fixed order.
//
// Macros: N, K, R, S, KS, MT (8-token groups: 4 or 8), CLUSTERS, BLOCKS_PER_SM, NORM, SILU, RESIDUAL, BIAS as in linear.cu (here NORM goes
// with any split: the blocks of a cluster exchange their sums of squares).
#include "common.cuh"

#define ROWS (64 * R)
#define KB (K / KS)
#define KW (KB / S)
#define C (KW / 32)
#define CHUNKS (KB / 32)
#define TILES (N / ROWS)
#define TOKENS (8 * MT)
#define W (4 * R * S)
#define THREADS (32 * W)
#define SINGLE (TILES <= CLUSTERS)
#define OWN (ROWS / KS)                 // rows of a tile that one block finishes
#define STRIDE (OWN % 16 == 8 ? OWN : OWN + 8)  // pairs of floats between token pairs: no bank conflicts
#define SOURCES (KS * S)
#define INBOX (SOURCES * TOKENS / 2 * STRIDE * 2)  // floats of one buffer
#define SHARERS (W > MT ? W / MT : 1)   // warps that stage the same tokens

static_assert(N % ROWS == 0 && K % (32 * KS * S) == 0 && OWN % 8 == 0 && (W % MT == 0 || MT % W == 0), "shape");

__device__ __forceinline__ void load_weights(u32 (&r)[4], const u16* p) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
}
__device__ __forceinline__ uint4 load_tokens(const u16* p, bool live) {  // volatile: a batch of them stays together
  uint4 v = make_uint4(0u, 0u, 0u, 0u);
  asm volatile("{ .reg .pred q; setp.ne.u32 q, %5, 0; @q ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(p), "r"((u32)live) : "memory");
  return v;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ u32 peer_address(const float* here, int rank) {  // the same place in block `rank` of the cluster
  u32 at = (u32)__cvta_generic_to_shared(here), there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}
__device__ __forceinline__ void send(float* here, int rank, float a, float b) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(peer_address(here, rank)), "f"(a), "f"(b) : "memory");
}
__device__ __forceinline__ void send(float* here, int rank, float a) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(peer_address(here, rank)), "f"(a) : "memory");
}

#define FOUR(m) "+f"(d[m][0]), "+f"(d[m][1]), "+f"(d[m][2]), "+f"(d[m][3])
// d += A B: A 64 x 16 from registers, B 16 x TOKENS: core matrices 128 bytes apart between 8 tokens, MT * 128 between 8 columns
__device__ __forceinline__ void wgmma(float (&d)[MT][4], u32 a0, u32 a1, u32 a2, u32 a3, const char* b) {
  const u64 at = (u64)(((u32)__cvta_generic_to_shared(b) & 0x3ffff) >> 4) | (u64)(MT * 8) << 16 | (u64)8 << 32;
#if MT == 4
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
      : FOUR(0), FOUR(1), FOUR(2), FOUR(3) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(at));
#else
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
      : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(at));
#endif
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
__device__ __forceinline__ void pin(u32& v) { asm volatile("" : "+r"(v)::"memory"); }    // stays in its register across the async unit's work
__device__ __forceinline__ void pin(float& v) { asm volatile("" : "+f"(v)::"memory"); }

// shared memory: x [CHUNKS][4][MT][8 tokens][16 bytes]; inbox [1 or 2 buffers][SOURCES][token pair][STRIDE rows][2 tokens]; squares
// [KS][SHARERS][TOKENS]
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
linear_mid(const u16* weights, const u16* x, const u16* res, const u16* bias, u16* y, int M, float eps) {
  extern __shared__ __align__(128) char shared[];
  float* inboxes = (float*)(shared + CHUNKS * 4 * MT * 128);
  float* squares_of = inboxes + (SINGLE ? 1 : 2) * INBOX;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int cluster = blockIdx.x / KS, split = blockIdx.x % KS;
  const int group = warp / 4, over_rows = group % R, over_k = group / R, in_group = warp % 4;

  if (KS > 1) cluster_arrive();  // peers must run before anyone sends
  const u16* wp = weights + (u64)(cluster * ROWS + over_rows * 64 + in_group * 16 + g) * K + split * KB + over_k * KW + t * 8;
  u32 w[C][2][4];
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int i = 0; i < 2; ++i) load_weights(w[c][i], wp + (u64)i * 8 * K + c * 32);
  pdl_trigger();
  pdl_wait();
  if (KS > 1) cluster_wait();

  {  // x of this block's columns into shared memory, 8 tokens x 32 columns a warp at a time
    constexpr int MINE = MT > W ? MT / W : 1, BATCH = 8;
#pragma unroll
    for (int mm = 0; mm < MINE; ++mm) {
      const int m = MT > W ? warp + mm * W : warp % MT;
      const u16* xp = x + (u64)(m * 8 + g) * K + split * KB + t * 8;
      const bool live = m * 8 + g < M;
      float sq = 0.f;
#pragma unroll 1
      for (int c = MT > W ? 0 : warp / MT; c < CHUNKS; c += SHARERS * BATCH) {
        uint4 v[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) v[i] = load_tokens(xp + (c + i * SHARERS) * 32, live && c + i * SHARERS < CHUNKS);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          if (c + i * SHARERS >= CHUNKS) break;
          u32* o = (u32*)(shared + (((c + i * SHARERS) * 4) * MT + m) * 128) + lane;
          o[0] = v[i].x;
          o[MT * 32] = v[i].y;
          o[MT * 64] = v[i].z;
          o[MT * 96] = v[i].w;
          sq += squares(v[i]);
        }
      }
#ifdef NORM
      sq += __shfl_xor_sync(0xffffffffu, sq, 1);
      sq += __shfl_xor_sync(0xffffffffu, sq, 2);
      for (int peer = t; peer < KS; peer += 4)
        send(squares_of + (split * SHARERS + (MT > W ? 0 : warp / MT)) * TOKENS + m * 8 + g, peer, sq);
#endif
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
  }

  int buffer = 0;
#pragma unroll 1
  for (int tile = cluster; tile < TILES; tile += CLUSTERS, buffer ^= SINGLE ? 0 : 1) {
    const bool more = !SINGLE && tile + CLUSTERS < TILES;
    wp += (u64)CLUSTERS * ROWS * K;
    float acc[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int q = 0; q < 4; ++q) acc[m][q] = 0.f;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int q = 0; q < 4; ++q) pin(acc[m][q]);
    const char* xs = shared + over_k * C * 4 * MT * 128;
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int q = 0; q < 4; ++q) pin(w[c][i][q]);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < 2; ++s)
        wgmma(acc, w[c][0][2 * s], w[c][1][2 * s], w[c][0][2 * s + 1], w[c][1][2 * s + 1], xs + (c * 4 + 2 * s) * MT * 128);
      wgmma_commit();
      if (!SINGLE && c) {  // the chunk before has been read: its registers are free
        wgmma_wait<1>();
        if (more)
#pragma unroll
          for (int i = 0; i < 2; ++i) load_weights(w[c - 1][i], wp + (u64)i * 8 * K + (c - 1) * 32);
      }
    }
    wgmma_wait<0>();
    if (more)
#pragma unroll
      for (int i = 0; i < 2; ++i) load_weights(w[C - 1][i], wp + (u64)i * 8 * K + (C - 1) * 32);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int q = 0; q < 4; ++q) pin(acc[m][q]);

    float* inbox = inboxes + buffer * INBOX;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = over_rows * 64 + in_group * 16 + h * 8, owner = row / OWN;
      float* to = inbox + (((split * S + over_k) * (TOKENS / 2) + t) * STRIDE + row % OWN + g) * 2;
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        if (8 * m + 2 * t >= M) continue;
        if (KS > 1) send(to + m * 4 * STRIDE * 2, owner, acc[m][2 * h], acc[m][2 * h + 1]);
        else *(float2*)(to + m * 4 * STRIDE * 2) = make_float2(acc[m][2 * h], acc[m][2 * h + 1]);
      }
    }
    if (KS > 1) cluster_barrier();  // two buffers: nobody sends into this one again before the next tile's barrier
    else __syncthreads();

    // this block's rows of the tile: two rows of two tokens a thread
    constexpr int QUADS = OWN / 2 * TOKENS / 2;
#pragma unroll
    for (int i = 0; i < (QUADS + THREADS - 1) / THREADS; ++i) {
      const int p = i * THREADS + tid, token = p / (OWN / 2) * 2, own = p % (OWN / 2) * 2, row = split * OWN + own;
      if (p >= QUADS || token >= M) break;
      const bool both = token + 1 < M;
      u32 add[2] = {0u, 0u};
#ifdef RESIDUAL
      const u32* rp = (const u32*)(res + (u64)token * N + tile * ROWS + row);
      add[0] = __ldcg(rp);
      if (both) add[1] = __ldcg(rp + N / 2);
#endif
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);  // row 0: token 0, token 1; row 1: the same
#pragma unroll
      for (int s = 0; s < SOURCES; ++s) {
        const float4 u = *(const float4*)(inbox + ((s * (TOKENS / 2) + token / 2) * STRIDE + own) * 2);
        v.x += u.x;
        v.y += u.y;
        v.z += u.z;
        v.w += u.w;
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (k && !both) break;
        float a = k ? v.y : v.x, b = k ? v.w : v.z;
#ifdef NORM
        float total = 0.f;
#pragma unroll
        for (int s = 0; s < KS * SHARERS; ++s) total += squares_of[s * TOKENS + token + k];
        const float scale = rsqrtf(total * (1.f / K) + eps);
        a *= scale;
        b *= scale;
#endif
#ifdef BIAS
        const u32 c = *(const u32*)(bias + tile * ROWS + row);
        a += low(c);
        b += high(c);
#endif
        a += low(add[k]);
        b += high(add[k]);
#ifdef SILU
        y[(u64)(token + k) * (N / 2) + (tile * ROWS + row) / 2] = (u16)pair(a / (1.f + __expf(-a)) * b, 0.f);
#else
        *(u32*)(y + (u64)(token + k) * N + tile * ROWS + row) = pair(a, b);
#endif
      }
    }
  }
}
