/* What one core can do at best, compiled once for every instruction set with -DBYTES=<bytes of its vectors>.
 *
 * Every loop but those at the end works on registers alone: nothing it could wait for but the arithmetic itself, so
 * no kernel that does the same arithmetic on memory can be faster. KEEP tells the compiler that a value changed; without
 * it the loops would be computed beforehand. A round of a loop is the number of multiply-accumulates in its name's
 * constant in limit.py.
 *
 * Counts of bytes may wrap around here; real kernels must widen them every 31 steps or less.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

typedef uint8_t bytes __attribute__((vector_size(BYTES)));
typedef uint64_t words __attribute__((vector_size(BYTES)));
typedef float floats __attribute__((vector_size(BYTES)));
typedef int32_t ints __attribute__((vector_size(BYTES)));

#if defined(__AVX512F__)
#define KEEP(x) __asm__ volatile("" : "+v"(x))
#elif defined(__x86_64__)
#define KEEP(x) __asm__ volatile("" : "+x"(x))
#else
#define KEEP(x) __asm__ volatile("" : "+w"(x))
#endif
#define KEEP_WORD(x) __asm__ volatile("" : "+r"(x))
/* x ^ w. Before AVX an instruction overwrites its operand, so there x itself turns into it and back. */
#if defined(__x86_64__) && BYTES == 16
#define DIFFERING(x, w) ({ (x) ^= (w); KEEP(x); (x); })
#else
#define DIFFERING(x, w) ({ KEEP(x); (x) ^ (w); })
#endif
#define EACH(i, n) _Pragma("clang loop unroll(full)") for (int i = 0; i < (n); i++)

/* ---- binary: xor, count, add ---- */

/* One instruction counts: VPOPCNTQ, or CNT of bytes. */
#if defined(__AVX512VPOPCNTDQ__) && BYTES == 64
void binary_counted(long rounds) {
  words x[4] = {{1}, {2}, {3}, {4}}, w = {5}, sum[8] = {{0}};
  KEEP(w);
  for (long r = 0; r < rounds; r++) {
    EACH(i, 8) {
      words v = DIFFERING(x[i % 4], w);
      sum[i] += (words)_mm512_popcnt_epi64((__m512i)v);
    }
  }
  EACH(i, 8) KEEP(sum[i]);
}
#elif defined(__aarch64__)
void binary_counted(long rounds) {
  uint8x16_t x[4] = {{1}, {2}, {3}, {4}}, w = {5}, sum[8] = {{0}};
  KEEP(w);
  for (long r = 0; r < rounds; r++) {
    EACH(i, 8) {
      uint8x16_t v = DIFFERING(x[i % 4], w);
      sum[i] = vaddq_u8(sum[i], vcntq_u8(v));
    }
  }
  EACH(i, 8) KEEP(sum[i]);
}
#endif

#if defined(__x86_64__)
/* POPCNT of single words. */
void binary_popcnt(long rounds) {
  uint64_t x[4] = {1, 2, 3, 4}, w = 5, sum[4] = {0};
  KEEP_WORD(w);
  for (long r = 0; r < rounds; r++) {
    EACH(i, 4) {
      x[i] ^= w;
      KEEP_WORD(x[i]);
      sum[i] += (uint64_t)__builtin_popcountll(x[i]);
      KEEP_WORD(sum[i]); /* no vectors */
    }
  }
}

#if BYTES == 64
#define SHUFFLE(table, index) (bytes)_mm512_shuffle_epi8((__m512i)(table), (__m512i)(index))
#define PARITY(a, b, c) (bytes)_mm512_ternarylogic_epi64((__m512i)(a), (__m512i)(b), (__m512i)(c), 0x96)
#define MAJORITY(a, b, c) (bytes)_mm512_ternarylogic_epi64((__m512i)(a), (__m512i)(b), (__m512i)(c), 0xE8)
#else
#if BYTES == 32
#define SHUFFLE(table, index) (bytes)_mm256_shuffle_epi8((__m256i)(table), (__m256i)(index))
#else
#define SHUFFLE(table, index) (bytes)_mm_shuffle_epi8((__m128i)(table), (__m128i)(index))
#endif
#define PARITY(a, b, c) ((a) ^ (b) ^ (c))
#define MAJORITY(a, b, c) (((a) & (b)) | (((a) ^ (b)) & (c)))
#endif

static inline bytes count_table(void) {
  static const uint8_t counts[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};
  bytes table;
  EACH(i, BYTES / 16) memcpy((char *)&table + 16 * i, counts, 16);
  KEEP(table);
  return table;
}

/* The bits set in each byte, by two lookups. */
static inline bytes counted(bytes v, bytes table, bytes low) {
  return SHUFFLE(table, v & low) + SHUFFLE(table, (bytes)((words)v >> 4) & low);
}

/* A carry-save adder: three bits of weight 1 become one of weight 1, which replaces `sum`, and one of weight 2. */
static inline bytes carry_save(bytes *sum, bytes b, bytes c) {
  bytes carry = MAJORITY(b, c, *sum);
  *sum = PARITY(b, c, *sum);
  return carry;
}

void binary_table(long rounds) {
  bytes x[4] = {{1}, {2}, {3}, {4}}, w = {5}, sum[4] = {{0}}, table = count_table(), low = {0};
  low += 15;
  KEEP(low);
  KEEP(w);
  for (long r = 0; r < rounds; r++) {
    EACH(i, 4) {
      sum[i] += counted(DIFFERING(x[i], w), table, low);
      KEEP(sum[i]); /* or LLVM adds in another order */
    }
  }
}

/* Harley and Seal: bits of weight 4 are counted by lookups, a fourth as often. */
void binary_carry_save_2(long rounds) {
  bytes x[4] = {{1}, {2}, {3}, {4}}, w = {5}, ones = {0}, twos = {0}, sum = {0}, table = count_table(), low = {0};
  low += 15;
  KEEP(low);
  KEEP(w);
  for (long r = 0; r < rounds; r++) {
    bytes v[4];
    EACH(i, 4) v[i] = DIFFERING(x[i], w);
    bytes a = carry_save(&ones, v[0], v[1]), b = carry_save(&ones, v[2], v[3]);
    sum += counted(carry_save(&twos, a, b), table, low);
    KEEP(sum);
  }
  KEEP(ones);
  KEEP(twos);
}

/* The same with bits of weight 8. */
void binary_carry_save_3(long rounds) {
  bytes x[4] = {{1}, {2}, {3}, {4}}, w = {5}, ones = {0}, twos = {0}, fours = {0}, sum = {0};
  bytes table = count_table(), low = {0}, half[2];
  low += 15;
  KEEP(low);
  KEEP(w);
  for (long r = 0; r < rounds; r++) {
    EACH(h, 2) {
      bytes v[4];
      EACH(i, 4) v[i] = DIFFERING(x[i], w);
      bytes a = carry_save(&ones, v[0], v[1]), b = carry_save(&ones, v[2], v[3]);
      half[h] = carry_save(&twos, a, b);
    }
    sum += counted(carry_save(&fours, half[0], half[1]), table, low);
    KEEP(sum);
  }
  KEEP(ones);
  KEEP(twos);
  KEEP(fours);
}
#endif

/* ---- float32: one multiply-add, or a multiplication and an addition before FMA ---- */

void float_fma(long rounds) {
  floats x = {1e-9f}, w = {1e-9f}, sum[12] = {{0}};
  KEEP(w);
  for (long r = 0; r < rounds; r++) {
    EACH(i, 12) {
      KEEP(x);
      sum[i] += x * w;
    }
  }
  EACH(i, 12) KEEP(sum[i]);
}

/* ---- products of bytes, summed in int32 ---- */

#if defined(__AVX512VNNI__) && BYTES == 64
void int8_vpdpbusd(long rounds) {
  __m512i x = {1}, w = {2}, sum[12] = {{0}};
  KEEP(w);
  for (long r = 0; r < rounds; r++) {
    EACH(i, 12) {
      KEEP(x);
      sum[i] = _mm512_dpbusd_epi32(sum[i], x, w);
    }
  }
  EACH(i, 12) KEEP(sum[i]);
}
#endif

#if defined(__x86_64__)
#if BYTES == 64
#define MADDUBS(a, b) (ints)_mm512_maddubs_epi16((__m512i)(a), (__m512i)(b))
#define MADDWD(a, b) (ints)_mm512_madd_epi16((__m512i)(a), (__m512i)(b))
#elif BYTES == 32
#define MADDUBS(a, b) (ints)_mm256_maddubs_epi16((__m256i)(a), (__m256i)(b))
#define MADDWD(a, b) (ints)_mm256_madd_epi16((__m256i)(a), (__m256i)(b))
#else
#define MADDUBS(a, b) (ints)_mm_maddubs_epi16((__m128i)(a), (__m128i)(b))
#define MADDWD(a, b) (ints)_mm_madd_epi16((__m128i)(a), (__m128i)(b))
#endif

/* Bytes widened to 16 bits beforehand: exact. */
void int8_pmaddwd(long rounds) {
  ints x = {1}, w = {2}, sum[8] = {{0}};
  KEEP(w);
  for (long r = 0; r < rounds; r++) {
    EACH(i, 8) {
      KEEP(x);
      sum[i] += MADDWD(x, w);
    }
  }
  EACH(i, 8) KEEP(sum[i]);
}

/* Sums of two products saturate at 16 bits: exact for weights of 7 bits. */
void int8_pmaddubsw(long rounds) {
  ints x = {1}, w = {2}, ones = {0}, sum[8] = {{0}};
  ones += 0x00010001;
  KEEP(ones);
  KEEP(w);
  for (long r = 0; r < rounds; r++) {
    EACH(i, 8) {
      KEEP(x);
      sum[i] += MADDWD(MADDUBS(x, w), ones);
    }
  }
  EACH(i, 8) KEEP(sum[i]);
}
#elif defined(__ARM_FEATURE_DOTPROD)
void int8_sdot(long rounds) {
  int8x16_t x = {1}, w = {2};
  int32x4_t sum[12] = {{0}};
  KEEP(w);
  for (long r = 0; r < rounds; r++) {
    EACH(i, 12) {
      KEEP(x);
      sum[i] = vdotq_s32(sum[i], x, w);
    }
  }
  EACH(i, 12) KEEP(sum[i]);
}
#elif defined(__aarch64__)
void int8_smull(long rounds) {
  int8x16_t x = {1}, w = {2};
  int32x4_t sum[8] = {{0}};
  KEEP(w);
  for (long r = 0; r < rounds; r++) {
    EACH(i, 8) {
      KEEP(x);
      int16x8_t products = vmlal_high_s8(vmull_s8(vget_low_s8(x), vget_low_s8(w)), x, w);
      sum[i] = vpadalq_s16(sum[i], products);
    }
  }
  EACH(i, 8) KEEP(sum[i]);
}
#endif

/* ---- memory: `size` bytes, a multiple of 8·BYTES, from start to end, `rounds` times ---- */

void memory_read(const char *from, size_t size, long rounds) {
  words sum[8] = {{0}};
  for (long r = 0; r < rounds; r++) {
    for (const words *p = (const words *)from, *end = (const words *)(from + size); p < end; p += 8)
      EACH(i, 8) sum[i] ^= p[i];
    EACH(i, 8) KEEP(sum[i]);
  }
}

void memory_copy(char *to, const char *from, size_t size, long rounds) {
  for (long r = 0; r < rounds; r++) {
    memcpy(to, from, size);
    __asm__ volatile("" : : "r"(to), "r"(from) : "memory");
  }
}
