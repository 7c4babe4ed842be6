// y[M, N] = x[M, K] W[N, K]^T for few tokens (M <= 8 MT), bf16 in and out, fp32 sums, W in bf16 or e4m3: the weights go straight from
// memory into the registers of mma.m16n8k16, never through shared memory, and all loads of a tile are in flight before the kernel
// waits for its predecessor (PDL). A decode step's linears are bound by reading W once; this reads it at close to the card's rate.
//
// Shape of the work: a cluster of KS blocks owns tiles of ROWS = 16 J rows of W, walking with stride CLUSTERS. The K columns are
// split over the KS blocks and, inside a block, over W warps; a warp's share of a tile is C chunks of 64 bytes a row. While a chunk is
// multiplied, the same chunk of the next tile is already being read into its registers.
//
// Fragments: lane (g = lane / 4, t = lane % 4) reads 16 bytes, row g, columns 8 t .. 8 t + 7 of a chunk. Words 2 s and 2 s + 1 serve
// as the operands of k16 step s (s = 0, 1). x is read by the same pattern with tokens as rows, so both operands see the columns in
// one (permuted) order, which a sum does not mind. Of e4m3 the 16 bytes are columns 16 t .. 16 t + 15, and word s (s = 0 .. 3) becomes
// the operands of step s in registers (`even`, `odd`). x stays bf16: it is not rounded to e4m3.
//
// Sums are taken in a fixed order: over a warp's chunks, then over warps, then over the cluster's blocks. A token's result does not
// depend on which other tokens are in the batch.
//
// Macros: N, K, J, W, KS, MT, CLUSTERS, BLOCKS_PER_SM; NORM: x is scaled by 1 / rms(x) (needs KS 1); SILU: rows of W alternate gate,
// up, and y[M, N / 2] = silu(gate) up; RESIDUAL: res[M, N] is added; BIAS: bias[N] is added. FP8: W is e4m3 with fp32 scales, [N] where
// FP8 is 1, [K / 128][N] for each 128 columns of a row where it is 128; x is multiplied by norm[K] first where there is NORM (bf16
// weights hold that already).
#include "common.cuh"
#include "fragments.cuh"

#ifdef FP8
typedef unsigned char weight;
#define COLUMNS 64                     // of a chunk
#define RUN (FP8 == 1 ? C : KW % FP8 ? 1 : FP8 / COLUMNS)  // chunks that share a scale
#else
typedef u16 weight;
#define COLUMNS 32
#endif
#define PIECES (COLUMNS / 32)          // 16 bytes of x that go with those of weights

#define ROWS (16 * J)
#define KB (K / KS)
#define KW (KB / W)
#define C (KW / COLUMNS)
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
#ifdef FP8
#define SINGLE 0                       // x would take too many registers
#else
#define SINGLE (TILES <= CLUSTERS)     // one tile a block: x goes straight to registers
#endif
#define SUMS (W * TOKENS * STRIDE)     // floats of one buffer of warps' sums

static_assert(N % ROWS == 0 && K % KS == 0 && KB % W == 0 && KW % COLUMNS == 0 && PAIRS % KS == 0, "shape");
#ifdef NORM
static_assert(KS == 1, "1 / rms(x) needs all of x in the block");
#endif

// shared memory: sums of the warps [2 buffers][W][TOKENS][STRIDE], sums of squares [W][TOKENS], scales [TOKENS], KS > 1: sums of the
// block [WALK][PAIRS] of float2; unless SINGLE, x as fragments [W][C][PIECES][MT][32 lanes] of 16 bytes
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
linear(const weight* weights, const u16* x, const u16* res, const u16* bias, u16* y, int M, float eps
#ifdef FP8
       , const float* scales, const u16* norm
#endif
) {
  extern __shared__ __align__(16) float shared[];
  float* squares_of = shared + 2 * SUMS;
  float* scale_of = squares_of + W * TOKENS;
  float2* block_sums = (float2*)(scale_of + TOKENS);
  char* x_shared = (char*)(block_sums + (KS > 1 ? WALK * PAIRS : 0));
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int cluster = blockIdx.x / KS, split = blockIdx.x % KS;
  const int k0 = split * KB + warp * KW;

  const weight* wp = weights + (u64)(cluster * ROWS + g) * K + k0 + t * (COLUMNS / 4);
  u32 w[C][2 * J][4];
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int i = 0; i < 2 * J; ++i) load_weights(w[c][i], wp + (u64)i * 8 * K + c * COLUMNS);
#ifdef FP8
  const float* sp = scales + cluster * ROWS + g;
  float ws[C / RUN][2 * J];  // of the rows of a lane's weights
  auto load_scales = [&](int run) {
#pragma unroll
    for (int i = 0; i < 2 * J; ++i) load_scale(ws[run][i], sp + (FP8 == 1 ? 0 : (k0 + run * RUN * COLUMNS) / 128 * N) + 8 * i);
  };
#pragma unroll
  for (int run = 0; run < C / RUN; ++run) load_scales(run);
#ifdef NORM
  for (int i = tid; i < K / 64; i += THREADS) prefetch(norm + i * 64);
#endif
#endif
  pdl_trigger();
  pdl_wait();

  const u16* xp = x + (u64)g * K + k0 + t * (COLUMNS / 4);
  uint4 xr[SINGLE ? C : 1][MT];
  char* mine = x_shared + (u64)warp * C * PIECES * MT * 512 + lane * 16;
  float sq[MT];
#pragma unroll
  for (int m = 0; m < MT; ++m) sq[m] = 0.f;
#pragma unroll
  for (int c = 0; c < C * PIECES; ++c) {
    const int at = c / PIECES * COLUMNS + c % PIECES * 8;
#ifdef FP8
    uint4 by = make_uint4(LARGER, LARGER, LARGER, LARGER);
#ifdef NORM
    by = larger(*(const uint4*)(norm + k0 + t * (COLUMNS / 4) + at));
#endif
#endif
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const uint4 v = load_tokens(xp + (u64)m * 8 * K + at, m * 8 + g < M);
#ifdef FP8
      *(uint4*)(mine + (c * MT + m) * 512) = as_factor(v, by);
#else
      if (SINGLE) xr[SINGLE ? c : 0][m] = v;
      else *(uint4*)(mine + (c * MT + m) * 512) = v;
#endif
#ifdef NORM
      sq[m] += squares(v);
#endif
    }
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
    clear(acc);
#ifdef FP8
    sp += CLUSTERS * ROWS;
    float part[J][MT][4];  // of one scale
#endif
#pragma unroll
    for (int c = 0; c < C; ++c) {
#ifdef FP8
      if (c % RUN == 0) clear(part);
      multiply(part, w[c], mine + c * 2 * MT * 512);
      if ((c + 1) % RUN == 0) {
#pragma unroll
        for (int j = 0; j < J; ++j)
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const float scale = ws[c / RUN][2 * j + q / 2] * 0x1p60f;
#pragma unroll
            for (int m = 0; m < MT; ++m) acc[j][m][q] = fmaf(part[j][m][q], scale, acc[j][m][q]);
          }
        if (more) load_scales(c / RUN);
      }
#else
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const uint4 v = SINGLE ? xr[SINGLE ? c : 0][m] : *(const uint4*)(mine + (c * MT + m) * 512);
#pragma unroll
        for (int j = 0; j < J; ++j) {
          mma(acc[j][m], w[c][2 * j][0], w[c][2 * j + 1][0], w[c][2 * j][1], w[c][2 * j + 1][1], v.x, v.y);
          mma(acc[j][m], w[c][2 * j][2], w[c][2 * j + 1][2], w[c][2 * j][3], w[c][2 * j + 1][3], v.z, v.w);
        }
      }
#endif
      if (more)
#pragma unroll
        for (int i = 0; i < 2 * J; ++i) load_weights(w[c][i], wp + (u64)i * 8 * K + c * COLUMNS);
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
