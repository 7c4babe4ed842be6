// What linear.cu does by single instructions, and numbers as the operands of its matrix product. A host has its own (FRAGMENTS).
#ifndef FRAGMENTS
#define FRAGMENTS

__device__ __forceinline__ void load_weights(u32 (&r)[4], const void* p) {  // volatile: stays ahead of the wait
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
}
__device__ __forceinline__ void load_scale(float& r, const float* p) {
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(r) : "l"(p));
}
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 product(u32 a, u32 b) {  // of two bf16 pairs
  u32 r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
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
#endif

__device__ __forceinline__ uint4 load_tokens(const u16* p, bool live) {
  return live ? __ldcg((const uint4*)p) : make_uint4(0u, 0u, 0u, 0u);
}

template <int Groups, int Tokens>
__device__ __forceinline__ void clear(float (&sums)[Groups][Tokens][4]) {
#pragma unroll
  for (int i = 0; i < Groups * Tokens * 4; ++i) sums[i / (Tokens * 4)][i / 4 % Tokens][i % 4] = 0.f;
}

// Four e4m3 in a word become two pairs of bf16, bytes 0 and 2, 1 and 3, by shifting exponent and mantissa to where bf16 has theirs,
// whose exponents count from 2^120 further down. That is exact, also below the normal numbers; NaN, which no weight is, becomes 480.
// The other factor is taken 2^60 larger (exact: `product`), the sum 2^60 larger again, so that both stay far from what float32 holds.
#define LARGER 0x5d805d80u  // a bf16 pair of 2^60
__device__ __forceinline__ u32 even(u32 w) { return ((w << 4) & 0x07f007f0u) | ((w << 8) & 0x80008000u); }
__device__ __forceinline__ u32 odd(u32 w) { return ((w >> 4) & 0x07f007f0u) | (w & 0x80008000u); }
__device__ __forceinline__ uint4 larger(uint4 v) {
  return make_uint4(product(v.x, LARGER), product(v.y, LARGER), product(v.z, LARGER), product(v.w, LARGER));
}
// Eight neighbours times `by`, each four of them in the order of `even`, `odd`.
__device__ __forceinline__ uint4 as_factor(uint4 v, uint4 by) {
  const u32 a = product(v.x, by.x), b = product(v.y, by.y), c = product(v.z, by.z), d = product(v.w, by.w);
  return make_uint4(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632), __byte_perm(c, d, 0x5410), __byte_perm(c, d, 0x7632));
}
// part += W x^T of 64 columns. w: a lane's words of 2 Groups rows (g, g + 8, ...); x: its vectors of `as_factor`, [2][Tokens], 512 bytes apart.
template <int Groups, int Tokens>
__device__ __forceinline__ void multiply(float (&part)[Groups][Tokens][4], const u32 (&w)[2 * Groups][4], const char* x) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 v[Tokens];
#pragma unroll
    for (int m = 0; m < Tokens; ++m) v[m] = *(const uint4*)(x + (half * Tokens + m) * 512);
#pragma unroll
    for (int j = 0; j < Groups; ++j) {
      const u32 a = w[2 * j][2 * half], b = w[2 * j + 1][2 * half], c = w[2 * j][2 * half + 1], d = w[2 * j + 1][2 * half + 1];
#pragma unroll
      for (int m = 0; m < Tokens; ++m) mma(part[j][m], even(a), even(b), odd(a), odd(b), v[m].x, v[m].y);
#pragma unroll
      for (int m = 0; m < Tokens; ++m) mma(part[j][m], even(c), even(d), odd(c), odd(d), v[m].z, v[m].w);
    }
  }
}
