// y[M, N] = x[M, K] W[N, K]^T for few tokens (M <= 8 MT), bf16 in and out, fp32 sums: the weights go straight from memory into
// the registers of mma.m16n8k16, never through shared memory, and all loads of a tile are in flight before the kernel waits for
// its predecessor (PDL). A decode step's linears are bound by reading W once; this reads it at close to the card's rate.
//
// Shape of the work: a cluster of KS blocks owns tiles of ROWS = 16 J rows of W, walking with stride CLUSTERS. The K columns are
// split over the KS blocks and, inside a block, over W warps; a warp's share of a tile is C chunks of 32 columns. While a chunk is
// multiplied, the same chunk of the next tile is already being read into its registers.
//
// Fragments: lane (g = lane / 4, t = lane % 4) reads 16 bytes, row g, columns 8 t .. 8 t + 7 of a chunk. Words 2 s and 2 s + 1 serve
// as the operands of k16 step s (s = 0, 1). x is read by the same pattern with tokens as rows, so both operands see the columns in
// one (permuted) order, which a sum does not mind.
//
// Sums are taken in a fixed order: over a warp's chunks, then over warps, then over the cluster's blocks. A token's result does not
// depend on which other tokens are in the batch.
//
// Macros: N, K, J, W, KS, MT, CLUSTERS, BLOCKS_PER_SM; NORM: x is scaled by 1 / rms(x) (needs KS 1); SILU: rows of W alternate gate,
// up, and y[M, N / 2] = silu(gate) up; RESIDUAL: res[M, N] is added; BIAS: bias[N] is added.
#include "common.cuh"

#define ROWS (16 * J)
#define KB (K / KS)
#define KW (KB / W)
#define C (KW / 32)
#define TILES (N / ROWS)
#define TOKENS (8 * MT)
#define THREADS (32 * W)
#define STRIDE (ROWS + 4)              // floats between tokens of a warp's sums: lanes meet no bank twice
#define PAIRS (ROWS / 2 * TOKENS)      // (token, two rows) of a tile
#define OWN (PAIRS / KS)               // pairs of a tile that one block of a cluster finishes
#define FIT (THREADS / PAIRS)
#define PARTS (FIT >= 8 && W >= 8 ? 8 : FIT >= 4 && W >= 4 ? 4 : FIT >= 2 ? 2 : 1)  // neighbouring threads that sum one pair
#define ROUNDS ((PAIRS * PARTS + THREADS - 1) / THREADS)
#define WALK ((TILES + CLUSTERS - 1) / CLUSTERS)  // tiles of a cluster at most
#define SINGLE (TILES <= CLUSTERS)     // one tile a block: x goes straight to registers
#define SUMS (W * TOKENS * STRIDE)     // floats of one buffer of warps' sums

static_assert(N % ROWS == 0 && K % KS == 0 && KB % W == 0 && KW % 32 == 0 && PAIRS % KS == 0, "shape");
#ifdef NORM
static_assert(KS == 1, "1 / rms(x) needs all of x in the block");
#endif

__device__ __forceinline__ void load_weights(u32 (&r)[4], const u16* p) {  // volatile: stays ahead of the wait
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
}
__device__ __forceinline__ uint4 load_tokens(const u16* p, bool live) {
  return live ? __ldcg((const uint4*)p) : make_uint4(0u, 0u, 0u, 0u);
}
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ float2 peer_read(const float2* here, int rank) {  // the same place in block `rank` of the cluster
  u32 at = (u32)__cvta_generic_to_shared(here), there;
  float2 v;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(there) : "memory");
  return v;
}
__device__ __forceinline__ float squares(uint4 v) {
  const u32 e[4] = {v.x, v.y, v.z, v.w};
  float q = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) q = fmaf(low(e[i]), low(e[i]), fmaf(high(e[i]), high(e[i]), q));
  return q;
}

// shared memory: sums of the warps [2 buffers][W][TOKENS][STRIDE], sums of squares [W][TOKENS], scales [TOKENS], KS > 1: sums of the
// block [WALK][PAIRS] of float2; unless SINGLE, x as fragments [W][C][MT][32 lanes] of 16 bytes
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
linear(const u16* weights, const u16* x, const u16* res, const u16* bias, u16* y, int M, float eps) {
  extern __shared__ __align__(16) float shared[];
  float* squares_of = shared + 2 * SUMS;
  float* scale_of = squares_of + W * TOKENS;
  float2* block_sums = (float2*)(scale_of + TOKENS);
  char* x_shared = (char*)(block_sums + (KS > 1 ? WALK * PAIRS : 0));
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int cluster = blockIdx.x / KS, split = blockIdx.x % KS;
  const int k0 = split * KB + warp * KW;

  const u16* wp = weights + (u64)(cluster * ROWS + g) * K + k0 + t * 8;
  u32 w[C][2 * J][4];
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int i = 0; i < 2 * J; ++i) load_weights(w[c][i], wp + (u64)i * 8 * K + c * 32);
  pdl_trigger();
  pdl_wait();

  const u16* xp = x + (u64)g * K + k0 + t * 8;
  uint4 xr[SINGLE ? C : 1][MT];
  char* mine = x_shared + (u64)warp * C * MT * 512 + lane * 16;
  float sq[MT];
#pragma unroll
  for (int m = 0; m < MT; ++m) sq[m] = 0.f;
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const uint4 v = load_tokens(xp + (u64)m * 8 * K + c * 32, m * 8 + g < M);
      if (SINGLE) xr[SINGLE ? c : 0][m] = v;
      else *(uint4*)(mine + (c * MT + m) * 512) = v;
#ifdef NORM
      sq[m] += squares(v);
#endif
    }
#ifdef NORM
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    sq[m] += __shfl_xor_sync(0xffffffffu, sq[m], 1);
    sq[m] += __shfl_xor_sync(0xffffffffu, sq[m], 2);
    if (t == 0) squares_of[warp * TOKENS + m * 8 + g] = sq[m];
  }
#endif
  __syncwarp();
#ifdef NORM
  if (!SINGLE) {
    __syncthreads();
    if (tid < TOKENS) {
      float total = 0.f;
      for (int i = 0; i < W; ++i) total += squares_of[i * TOKENS + tid];
      scale_of[tid] = rsqrtf(total * (1.f / K) + eps);  // read behind the first tile's barrier
    }
  }
#endif

  // the two rows of pair `p`, summed over the warps; every lane of a warp calls it, PARTS neighbours with the same pair
  auto over_warps = [&](const float* sums, int p) {
    const float* at = sums + (p / (ROWS / 2)) * STRIDE + 2 * (p % (ROWS / 2));
    float2 r = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < W; i += PARTS) {
      const int source = i + tid % PARTS;
      if (W % PARTS == 0 || source < W) {
        const float2 v = *(const float2*)(at + source * TOKENS * STRIDE);
        r.x += v.x;
        r.y += v.y;
      }
    }
#pragma unroll
    for (int d = PARTS / 2; d; d >>= 1) {
      r.x += __shfl_xor_sync(0xffffffffu, r.x, d);
      r.y += __shfl_xor_sync(0xffffffffu, r.y, d);
    }
    return r;
  };
  // what follows the sum over K, for rows 2 r, 2 r + 1 of a tile and one token
  auto finish = [&](float2 v, float scale, u32 add, int tile, int token, int r) {
#ifdef NORM
    v.x *= scale;
    v.y *= scale;
#endif
#ifdef BIAS
    const u32 b = *(const u32*)(bias + tile * ROWS + 2 * r);
    v.x += low(b);
    v.y += high(b);
#endif
    v.x += low(add);
    v.y += high(add);
#ifdef SILU
    y[(u64)token * (N / 2) + tile * (ROWS / 2) + r] = (u16)pair(v.x / (1.f + __expf(-v.x)) * v.y, 0.f);
#else
    *(u32*)(y + (u64)token * N + tile * ROWS + 2 * r) = pair(v.x, v.y);
#endif
  };
  auto residual = [&](int tile, int token, int r) {
#ifdef RESIDUAL
    return token < M ? __ldcg((const u32*)(res + (u64)token * N + tile * ROWS + 2 * r)) : 0u;
#else
    return 0u;
#endif
  };

  int buffer = 0;
  for (int tile = cluster; tile < TILES; tile += CLUSTERS, buffer ^= 1) {
    const bool more = !SINGLE && tile + CLUSTERS < TILES;
    wp += (u64)CLUSTERS * ROWS * K;
    u32 added[ROUNDS];  // asked for early
    if (KS == 1)
#pragma unroll
      for (int i = 0; i < ROUNDS; ++i) {
        const int p = (i * THREADS + tid) / PARTS;
        added[i] = p < PAIRS && tid % PARTS == 0 ? residual(tile, p / (ROWS / 2), p % (ROWS / 2)) : 0u;
      }
    float acc[J][MT][4];
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int q = 0; q < 4; ++q) acc[j][m][q] = 0.f;
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const uint4 v = SINGLE ? xr[SINGLE ? c : 0][m] : *(const uint4*)(mine + (c * MT + m) * 512);
#pragma unroll
        for (int j = 0; j < J; ++j) {
          mma(acc[j][m], w[c][2 * j][0], w[c][2 * j + 1][0], w[c][2 * j][1], w[c][2 * j + 1][1], v.x, v.y);
          mma(acc[j][m], w[c][2 * j][2], w[c][2 * j + 1][2], w[c][2 * j][3], w[c][2 * j + 1][3], v.z, v.w);
        }
      }
      if (more)
#pragma unroll
        for (int i = 0; i < 2 * J; ++i) load_weights(w[c][i], wp + (u64)i * 8 * K + c * 32);
    }

    // rows g, g + 8 and tokens 2 t, 2 t + 1 of each fragment, to [warp][token][row]
    float* sums = shared + buffer * SUMS;
    float* out = sums + warp * TOKENS * STRIDE;
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        float* o = out + (m * 8 + 2 * t) * STRIDE + j * 16 + g;
        o[0] = acc[j][m][0];
        o[STRIDE] = acc[j][m][1];
        o[8] = acc[j][m][2];
        o[STRIDE + 8] = acc[j][m][3];
      }
    __syncthreads();  // two buffers: nobody writes this one again before the next tile's barrier

#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
      const int p = (i * THREADS + tid) / PARTS, token = p / (ROWS / 2), r = p % (ROWS / 2);
      if (PAIRS * PARTS % THREADS && p >= PAIRS) break;  // whole warps
      const float2 v = over_warps(sums, p);
      float scale = 1.f;
#ifdef NORM
      if (SINGLE) {
        float total = 0.f;
#pragma unroll
        for (int s = 0; s < W; s += PARTS)
          if (W % PARTS == 0 || s + tid % PARTS < W) total += squares_of[(s + tid % PARTS) * TOKENS + token];
#pragma unroll
        for (int d = PARTS / 2; d; d >>= 1) total += __shfl_xor_sync(0xffffffffu, total, d);
        scale = rsqrtf(total * (1.f / K) + eps);
      } else {
        scale = scale_of[token];
      }
#endif
      if (tid % PARTS) continue;
      if (KS > 1) block_sums[tile / CLUSTERS * PAIRS + p] = v;  // for the end: no block waits for another inside the walk
      else if (token < M) finish(v, scale, added[i], tile, token, r);
    }
  }
  if (KS > 1) {
    cluster_barrier();
    for (int i = tid; i < WALK * OWN; i += THREADS) {
      const int tile = cluster + i / OWN * CLUSTERS, p = split * OWN + i % OWN, token = p / (ROWS / 2), r = p % (ROWS / 2);
      if (tile >= TILES || token >= M) continue;
      const u32 add = residual(tile, token, r);
      float2 v = make_float2(0.f, 0.f);
#pragma unroll
      for (int s = 0; s < KS; ++s) {
        const float2 u = peer_read(block_sums + i / OWN * PAIRS + p, s);
        v.x += u.x;
        v.y += u.y;
      }
      finish(v, 1.f, add, tile, token, r);
    }
    cluster_barrier();  // no block leaves while a peer may still read its sums
  }
}
