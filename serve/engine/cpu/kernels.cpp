// CPU kernels of inference: products with packed weights, attention over a paged cache, and a whole
// transformer layer made of them.
//
// Activations are fp32 whatever the weights are (fp32, bf16, int8, int4). Before a product with quantised weights
// a row is rounded to int8, with a scale for each 32 inputs, and 32 products are summed as integers (as in Q8_0 of
// llama.cpp). Every output element is summed in one order that depends neither on how many rows there are nor on
// how many threads: a row computed in a batch equals the row computed alone to the bit, and a prompt read in chunks
// equals one read token by token.
//
// Plain C interface, called through ctypes; see modules.py for what calls it.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define MAX_ROWS 12
constexpr int VW = 16;
#elif defined(__AVX__)
#define MAX_ROWS 6
constexpr int VW = 8;
#else
#define MAX_ROWS 6
constexpr int VW = 4;
#endif
constexpr int BW = 2 * VW;   // outputs of one weight block: two vectors
// inputs that share a scale in a rounded row; weights have groups of one or more of them
constexpr int UNIT_INPUTS = 32;
constexpr int PAGE = 64;     // positions of a cache page
constexpr int UNIT = 4;      // weight blocks a thread takes at a time
constexpr int ROWS_TOGETHER = 24;  // rows of a prompt that attend as one item: their scores stay in the cache
constexpr int AHEAD = 512;   // bytes: lines of 16 bytes come too slowly for the machine's own prefetching

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));

enum Kind { F32 = 0, BF16 = 1, INT8 = 2, PLAIN_BF16 = 3, INT4 = 4 };  // PLAIN_BF16: of the cache

template <class T> static inline T load(const void* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
static inline vf splat(float x) { return x - vf{}; }
static inline vf load_bf16(const void* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 16);
#else
  typedef uint16_t vh __attribute__((vector_size(VW * 2)));
  return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16);
#endif
}
static inline float bf16_to_float(uint16_t b) {
  uint32_t u = uint32_t(b) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint16_t float_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16) | 0x40;  // NaN stays one
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline float sum(vf v) {
  float s[VW];
  store(s, v);
  for (int step = VW / 2; step; step /= 2)
    for (int i = 0; i < step; i++) s[i] += s[i + step];
  return s[0];
}

// exp to about 2 ulp (Cody-Waite reduction, degree 6).
static inline vf exp_(vf x) {
  const vf low = splat(-87.3f), high = splat(88.3f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  vf t = x * splat(1.44269504f);
  vi n = __builtin_convertvector(t + (t < vf{} ? splat(-0.5f) : splat(0.5f)), vi);
  vf fn = __builtin_convertvector(n, vf);
  vf r = x - fn * splat(0.693359375f) + fn * splat(2.12194440e-4f);
  vf p = splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  vi scale = (n + 127) << 23;
  return p * load<vf>(&scale);
}
static inline float exp1(float x) { return exp_(splat(x))[0]; }

struct Matrix {
  const void* data;   // packed, see pack below
  const float* bias;  // [out] or null
  int32_t in, out, kind, blocks;
  int32_t group;  // inputs that share a scale in quantised weights: a multiple of UNIT_INPUTS
};

static inline int units_of(int in) { return (in + UNIT_INPUTS - 1) / UNIT_INPUTS; }
static inline int unit_bytes(int kind) { return UNIT_INPUTS * BW / (kind == INT4 ? 2 : 1); }

// Bytes of one block of BW outputs.
static inline int64_t block_bytes(int in, int kind, int group) {
  if (kind == F32) return int64_t(in) * BW * 4;
  if (kind == BF16) return int64_t(in) * BW * 2;
  const int64_t units = units_of(in), each = group / UNIT_INPUTS;
  return units * unit_bytes(kind) + (units + each - 1) / each * BW * 2;
}

// out [N, B * BW] = B blocks of W times N rows of x. bf16: the 32-bit lane l of a line holds output l in its low
// and output l + VW in its high half.
// line: bytes from an input's weights to the next one's. ahead, stride: memory that is fetched meanwhile, line by line
// (where blocks stream, the machine does it itself).
template <int N, int B, int KIND>
static void micro(int in, const char* data, int64_t size, int64_t line, const float* x, int64_t ldx, float* out,
                  const char* ahead, int64_t stride) {
  vf acc[N][B][2] = {};
  const char* w[B];
  for (int j = 0; j < B; j++) w[j] = data + j * size;
  auto multiply = [&](vf (&to)[N][B][2], int j, int k, vf a, vf b) __attribute__((always_inline)) {
    for (int n = 0; n < N; n++) {
      const vf s = splat(x[n * ldx + k]);
      to[n][j][0] += s * a;
      to[n][j][1] += s * b;
    }
  };
  if (KIND == F32) {
    for (int k = 0; k < in; k++) {
      if (B == 1) __builtin_prefetch(ahead + k * stride, 0, 2);
      for (int j = 0; j < B; j++) {
        const char* at = w[j] + k * line;
        multiply(acc, j, k, load<vf>(at), load<vf>(at + VW * 4));
      }
    }
  } else if (KIND == BF16) {
    for (int k = 0; k < in; k++) {
      if (B == 1) __builtin_prefetch(ahead + k * stride, 0, 2);
      for (int j = 0; j < B; j++) {
        const vu both = load<vu>(w[j] + k * line);
        multiply(acc, j, k, (vf)(both << 16), (vf)(both & 0xffff0000u));
      }
    }
  } else {
    for (int k = 0; k < in; k++)
      for (int j = 0; j < B; j++) multiply(acc, j, k, load_bf16(w[j] + k * line), load_bf16(w[j] + k * line + VW * 2));
  }
  for (int n = 0; n < N; n++)
    for (int j = 0; j < B; j++) {
      store(out + (n * B + j) * BW, acc[n][j][0]);
      store(out + (n * B + j) * BW + VW, acc[n][j][1]);
    }
}

// A row of activations for products with quantised weights, one after the other.
struct Unit {
  float scale;
  int32_t sum;                // of the values, times 8: what int4 weights, stored from 0 to 15, count too much; int8
                              // weights stored from 0 to 255 count 16 times as much
  int8_t values[UNIT_INPUTS];  // -127 to 127
  uint8_t sizes[UNIT_INPUTS];  // their absolute values
};
static inline int64_t row_floats(int in) { return units_of(in) * int64_t(sizeof(Unit) / sizeof(float)); }
static inline bool quantised(int kind) { return kind == INT8 || kind == INT4; }

static void round_row(const float* x, int in, Unit* to) {
  typedef int8_t vb __attribute__((vector_size(VW)));
  for (int first = 0; first < in; first += UNIT_INPUTS, to++) {
    alignas(64) float v[UNIT_INPUTS] = {};
    memcpy(v, x + first, std::min(UNIT_INPUTS, in - first) * 4);
    vf most = {}, wrong = {};
    for (int i = 0; i < UNIT_INPUTS; i += VW) {
      const vf a = load<vf>(v + i), size = a < vf{} ? -a : a;
      wrong += a - a;  // NaN where a is infinite or none
      most = size > most ? size : most;
    }
    float top = 0;
    for (int i = 0; i < VW; i++) top = std::max(top, most[i]);
    const float inverse = top > 1e-30f ? 127.0f / top : 0.0f;
    to->scale = (top > 1e-30f ? top / 127.0f : 0.0f) + sum(wrong);
    for (int i = 0; i < UNIT_INPUTS; i += VW) {
      const vf a = load<vf>(v + i) * splat(inverse);
      const vf away = a + (a < vf{} ? splat(-0.5f) : splat(0.5f));
      const vb b = __builtin_convertvector(__builtin_convertvector(away, vi), vb);
      memcpy(to->values + i, &b, VW);
    }
    int total = 0;
    for (int i = 0; i < UNIT_INPUTS; i++) {
      total += to->values[i];
      to->sizes[i] = uint8_t(std::abs(to->values[i]));
    }
    to->sum = 8 * total;
  }
}

// Eight outputs at a time, whatever the width of the machine's vectors.
typedef float floats8 __attribute__((vector_size(32)));
typedef int32_t ints8 __attribute__((vector_size(32)));
#if defined(__AVX2__)
static inline floats8 scales_at(const char* p) {
  return (floats8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
}
#else
static inline floats8 scales_at(const char* p) {
  typedef uint16_t h8 __attribute__((vector_size(16)));
  typedef uint32_t u8 __attribute__((vector_size(32)));
  return (floats8)(__builtin_convertvector(load<h8>(p), u8) << 16);
}
#endif
// sum + the products of 4 unsigned and 4 signed bytes in each of 8 lanes.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define HAS_DOT 1
static inline ints8 dot(ints8 sum, __m256i unsigned_bytes, __m256i signed_bytes) {
  return (ints8)_mm256_dpbusd_epi32((__m256i)sum, unsigned_bytes, signed_bytes);
}
#elif defined(__AVXVNNI__)
#define HAS_DOT 1
static inline ints8 dot(ints8 sum, __m256i unsigned_bytes, __m256i signed_bytes) {
  return (ints8)_mm256_dpbusd_avx_epi32((__m256i)sum, unsigned_bytes, signed_bytes);
}
#endif
// sum + of each of 8 outputs 4 int8 weights times 4 values. With dot, weights are stored from 0 to 255.
static inline ints8 add_int8(ints8 sum, const char* w, const Unit& x, int k) {
#if defined(__AVX2__)
  const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  const __m256i values = _mm256_set1_epi32(load<int32_t>(x.values + k));
#if defined(HAS_DOT)
  return dot(sum, weights, values);
#else
  const __m256i sizes = _mm256_set1_epi32(load<int32_t>(x.sizes + k));
  const __m256i pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(weights, values));  // at most 2 * 127 * 127
  return sum + (ints8)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
#else
  for (int lane = 0; lane < 8; lane++)
    for (int i = 0; i < 4; i++) sum[lane] += int8_t(w[lane * 4 + i]) * x.values[k + i];
  return sum;
#endif
}
// sum + of each of 8 outputs 8 int4 weights, stored from 0 to 15, times 8 values. AVX2 without dot: two sums of 16 bits,
// which the 32 products of a unit cannot exceed (16 * 15 * 127).
static inline ints8 add_int4(ints8 sum, const char* w, const Unit& x, int k) {
#if defined(__AVX2__)
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)), low = _mm256_set1_epi8(15);
  const __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
  const __m256i x1 = _mm256_set1_epi32(load<int32_t>(x.values + k));
  const __m256i x2 = _mm256_set1_epi32(load<int32_t>(x.values + k + 4));
#if defined(HAS_DOT)
  return dot(dot(sum, first, x1), second, x2);
#else
  const __m256i a = _mm256_maddubs_epi16(first, x1), b = _mm256_maddubs_epi16(second, x2);
  return (ints8)_mm256_add_epi16((__m256i)sum, _mm256_add_epi16(a, b));
#endif
#else
  for (int lane = 0; lane < 8; lane++)
    for (int i = 0; i < 4; i++)
      sum[lane] += (w[lane * 4 + i] & 15) * x.values[k + i] + (uint8_t(w[lane * 4 + i]) >> 4) * x.values[k + 4 + i];
  return sum;
#endif
}
#if defined(HAS_DOT)
constexpr int INT8_OFFSET = 128;
#else
constexpr int INT8_OFFSET = 0;
#endif
static inline ints8 whole_int8(ints8 sum, const Unit& x) { return sum - INT8_OFFSET / 8 * x.sum; }
static inline ints8 whole_int4(ints8 sum, const Unit& x) {
#if defined(__AVX2__) && !defined(HAS_DOT)
  sum = (ints8)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
#endif
  return sum - x.sum;
}

// As micro, of quantised weights: x is rows of Units. A group is BW scales in bf16 and then its units: lines of 4
// inputs (int4: 8, the first four in the low halves of the bytes) of each of BW outputs, one output after the other.
template <int N, int B, int KIND>
static void micro_quantised(int in, const char* data, int64_t size, int64_t group, const float* x, int64_t ldx,
                            float* out, const char*, int64_t) {
  constexpr int Q = BW / 8, STEP = KIND == INT4 ? 8 : 4, TOGETHER = B * Q >= 4 ? 1 : N < 4 / (B * Q) ? N : 4 / (B * Q);
  floats8 acc[N][B][Q] = {}, scales[B][Q] = {};
  const char* at = data;
  const int units = units_of(in);
  for (int unit = 0, left = 0; unit < units; unit++, left -= UNIT_INPUTS) {
    if (left == 0) {
      left = int(group);
      for (int j = 0; j < B; j++)
        for (int q = 0; q < Q; q++) scales[j][q] = scales_at(at + j * size + q * 16);
      at += BW * 2;
    }
    auto rows = [&](int from, auto count) __attribute__((always_inline)) {  // whose sums fit the registers
      constexpr int R = decltype(count)::value;
      const Unit* xs[R];
      for (int r = 0; r < R; r++) xs[r] = reinterpret_cast<const Unit*>(x + (from + r) * ldx) + unit;
      ints8 sums[R][B][Q] = {};
      for (int k = 0; k < UNIT_INPUTS; k += STEP)
        for (int j = 0; j < B; j++) {
          const char* line = at + j * size + k / STEP * (BW * 4);
          if (from == 0) __builtin_prefetch(line + AHEAD);
          for (int q = 0; q < Q; q++)
            for (int r = 0; r < R; r++)
              sums[r][j][q] = KIND == INT4 ? add_int4(sums[r][j][q], line + q * 32, *xs[r], k)
                                           : add_int8(sums[r][j][q], line + q * 32, *xs[r], k);
        }
      for (int r = 0; r < R; r++)
        for (int j = 0; j < B; j++)
          for (int q = 0; q < Q; q++) {
            const ints8 whole = KIND == INT4 ? whole_int4(sums[r][j][q], *xs[r]) : whole_int8(sums[r][j][q], *xs[r]);
            acc[from + r][j][q] += __builtin_convertvector(whole, floats8) * (scales[j][q] * xs[r]->scale);
          }
    };
    int from = 0;
    for (; from + TOGETHER <= N; from += TOGETHER) rows(from, std::integral_constant<int, TOGETHER>());
    if constexpr (N % TOGETHER) rows(from, std::integral_constant<int, N % TOGETHER>());
    at += unit_bytes(KIND);
  }
  for (int n = 0; n < N; n++)
    for (int j = 0; j < B; j++)
      for (int q = 0; q < Q; q++) memcpy(out + (n * B + j) * BW + q * 8, &acc[n][j][q], 32);
}

typedef void (*Micro)(int, const char*, int64_t, int64_t, const float*, int64_t, float*, const char*, int64_t);

// As many blocks at once as keep the multipliers busy.
constexpr int blocks_at_once(int rows) { return rows * 4 <= MAX_ROWS ? 4 : rows * 2 <= MAX_ROWS ? 2 : 1; }

template <int N, int KIND> static Micro micro_of(bool several) {
  if constexpr (KIND == INT8 || KIND == INT4)
    return several ? micro_quantised<N, blocks_at_once(N), KIND> : micro_quantised<N, 1, KIND>;
  else
    return several ? micro<N, blocks_at_once(N), KIND> : micro<N, 1, KIND>;
}
template <int KIND> static Micro micro_of(int rows, bool several) {
  switch (rows) {
    case 1: return micro_of<1, KIND>(several);
    case 2: return micro_of<2, KIND>(several);
    case 3: return micro_of<3, KIND>(several);
    case 4: return micro_of<4, KIND>(several);
    case 5: return micro_of<5, KIND>(several);
    case 6: return micro_of<6, KIND>(several);
#if MAX_ROWS > 6
    case 7: return micro_of<7, KIND>(several);
    case 8: return micro_of<8, KIND>(several);
    case 9: return micro_of<9, KIND>(several);
    case 10: return micro_of<10, KIND>(several);
    case 11: return micro_of<11, KIND>(several);
    case 12: return micro_of<12, KIND>(several);
#endif
  }
  return nullptr;
}
static Micro micro_of(int kind, int rows, bool several) {
  switch (kind) {
    case F32: return micro_of<F32>(rows, several);
    case BF16: return micro_of<BF16>(rows, several);
    case INT8: return micro_of<INT8>(rows, several);
    case INT4: return micro_of<INT4>(rows, several);
    default: return micro_of<PLAIN_BF16>(rows, several);
  }
}

// emit(row, block, values [BW]) for rows of x against ``count`` blocks from ``block`` on.
template <class Emit>
static inline void tiles(const Matrix& m, int block, int count, const float* x, int64_t ldx, int row, int rows,
                         Emit& emit) {
  const int64_t size = block_bytes(m.in, m.kind, m.group);
  const int64_t line = quantised(m.kind) ? m.group : m.kind == F32 ? BW * 4 : BW * 2;
  const char* data = static_cast<const char*>(m.data) + block * size;
  alignas(64) float out[MAX_ROWS * 4 * BW];
  auto multiply = [&](int n, int first, int j, int b, const char* ahead, int64_t stride) {
    micro_of(m.kind, n, b > 1)(m.in, data + j * size, size, line, x + first * ldx, ldx, out, ahead, stride);
    for (int r = 0; r < n; r++)
      for (int i = 0; i < b; i++) emit(first + r, block + j + i, out + (r * b + i) * BW);
  };
  const int most = blocks_at_once(std::min(rows, MAX_ROWS));
  if (most > 1) {  // so few rows that they are one tile
    for (int j = 0; j < count;) {
      const int b = j + most <= count ? most : 1;
      multiply(rows, row, j, b, data, 0);
      j += b;
    }
    return;
  }
  // A block stays in the cache while the tiles of rows pass, and each tile fetches its part of the next block: a
  // line of the cache for an input. Where an input's weights are more than that, half of it would only disturb the
  // machine's own prefetching.
  const int passes = (rows + MAX_ROWS - 1) / MAX_ROWS;
  const bool fetch = line <= 64 * passes;
  for (int j = 0; j < count; j++) {
    const char* next = fetch ? data + std::min(j + 1, count - 1) * size : data;
    const int64_t share = fetch ? size / passes : 0;
    for (int pass = 0, first = row, left = rows; pass < passes; pass++) {
      const int n = (left + passes - pass - 1) / (passes - pass);  // 4 + 3 rows rather than 6 + 1
      multiply(n, first, j, 1, next + share * pass, share / m.in);
      left -= n;
      first += n;
    }
  }
}

static inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Phases of a job. Threads take items by a counter, and a phase ends when its items are done, not when all
// threads have come: one that the system has put aside holds nobody up unless it holds an item.
struct alignas(64) Phase {
  std::atomic<int> next{0};
  alignas(64) std::atomic<int> done{0};
};
constexpr int PHASES = 16;
struct Worker {
  Phase* phases;
  template <class F> void each(int count, F&& f) {
    Phase& phase = *phases++;
    for (int i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      f(i);
      phase.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; phase.done.load(std::memory_order_acquire) < count; spins++)
      if (spins < 4000) relax(); else std::this_thread::yield();
  }
};

// Threads of these kernels. They wait for work with their eyes open for about 0.1 ms, then sleep.
class Pool {
 public:
  void resize(int threads) {
    std::lock_guard<std::mutex> lock(running);
    wanted = threads;
  }
  template <class F> void run(F&& job) {
    std::unique_lock<std::mutex> lock(running, std::try_to_lock);
    if (!lock.owns_lock()) {  // another thread's job has the workers
      Phase own[PHASES];
      job(Worker{own});
      return;
    }
    start();
    for (Phase& phase : phases)
      phase.next.store(0, std::memory_order_relaxed), phase.done.store(0, std::memory_order_relaxed);
    call = [](void* f, Phase* p) { (*static_cast<std::remove_reference_t<F>*>(f))(Worker{p}); };
    argument = &job;
    number.fetch_add(1);
    if (asleep.load()) {
      std::lock_guard<std::mutex> guard(sleeping);
      wake.notify_all();
    }
    job(Worker{phases});
    number.fetch_add(1);  // odd while a job can be joined
    while (inside.load()) relax();
  }

 private:
  void start() {
    if (process != getpid()) process = getpid(), started = 1;  // workers do not survive a fork
    for (; started < wanted; started++) std::thread([this] { work(); }).detach();
  }
  void work() {
    for (uint64_t seen = 0;;) {
      uint64_t now;
      for (int spins = 0; (now = number.load()) == seen || now % 2 == 0; spins++) {
        if (spins < 3000) {
          relax();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleeping);
        asleep.fetch_add(1);
        wake.wait(lock, [&] { return number.load() != seen && number.load() % 2; });
        asleep.fetch_sub(1);
      }
      seen = now;
      inside.fetch_add(1);
      if (number.load() == now) call(argument, phases);
      inside.fetch_sub(1);
    }
  }

  std::mutex running, sleeping;
  std::condition_variable wake;
  Phase phases[PHASES];
  alignas(64) std::atomic<uint64_t> number{0};
  alignas(64) std::atomic<int> inside{0}, asleep{0};
  void (*call)(void*, Phase*) = nullptr;
  void* argument = nullptr;
  int wanted = 1, started = 1;
  pid_t process = 0;
};
static Pool& pool() {
  static Pool* the = new Pool;  // never destroyed: threads may outlive the process's end
  return *the;
}

// y = W x for all rows, by emit(row, block, values [BW]). rounded: room for the rows, where W is quantised.
template <class Emit>
static inline void product(Worker& worker, const Matrix& m, const float* x, int64_t ldx, int rows, float* rounded,
                           Emit&& emit) {
  if (quantised(m.kind)) {
    const int64_t stride = row_floats(m.in);
    worker.each(rows, [&](int r) { round_row(x + r * ldx, m.in, reinterpret_cast<Unit*>(rounded + r * stride)); });
    x = rounded, ldx = stride;
  }
  // rows whose x stays in L2
  const int at_once = std::max(MAX_ROWS, (64 << 10) / std::max(1, m.in) / MAX_ROWS * MAX_ROWS);
  const int unit = rows > MAX_ROWS && m.blocks >= 8 * UNIT ? 2 * UNIT : UNIT;
  const int chunks = (rows + at_once - 1) / at_once, units = (m.blocks + unit - 1) / unit;
  worker.each(chunks * units, [&](int i) {
    const int row = i / units * at_once, block = i % units * unit;
    tiles(m, block, std::min(unit, m.blocks - block), x, ldx, row, std::min(at_once, rows - row), emit);
  });
}

// An emit that stores into y [rows, ldy], bias added.
struct Store {
  const Matrix& m;
  float* y;
  int64_t ldy;
  void operator()(int row, int block, const float* values) const {
    const int first = block * BW, count = std::min(BW, m.out - first);
    float* to = y + row * ldy + first;
    if (m.bias)
      for (int i = 0; i < count; i++) to[i] = values[i] + m.bias[first + i];
    else
      memcpy(to, values, count * 4);
  }
};

static inline float mean_square(const float* x, int width) {
  vf acc[4] = {};
  int i = 0;
  for (; i + 4 * VW <= width; i += 4 * VW)
    for (int j = 0; j < 4; j++) {
      vf v = load<vf>(x + i + j * VW);
      acc[j] += v * v;
    }
  float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; i < width; i++) total += x[i] * x[i];
  return total / width;
}

// to = x / rms(x) * weight; weight null: none.
static inline void rms_norm(float* to, const float* x, const float* weight, int width, float eps) {
  const float scale = 1.0f / std::sqrt(mean_square(x, width) + eps);
  if (weight)
    for (int i = 0; i < width; i++) to[i] = x[i] * scale * weight[i];
  else
    for (int i = 0; i < width; i++) to[i] = x[i] * scale;
}

// Rows of a pack and where their keys are: one entry a row.
struct Rows {
  int32_t count;
  const int32_t* positions;
  const int32_t* lengths;  // keys read from the cache, its own included where it is written
  const int32_t* writes;   // place of its own key, or -1: seen by this row alone
  const int64_t* tables;   // address of its int32 places of positions 0, 1, ...
};
struct Cache {
  char* k;  // of one layer: [pages, kv_heads, head_dim, PAGE]
  char* v;  // [pages, kv_heads, PAGE, value_width]: head_dim, filled up to a multiple of the blocks
  int32_t value_width, kind;  // F32 or PLAIN_BF16
};

struct Layer {
  int32_t width, heads, kv_heads, head_dim, rope_dims, norms, mlp, mlp_width, qk_norm, output_gate, value_gate_width;
  float norm_eps, qk_eps, mlp_scale;
  const float *norm[4], *qk_bias, *q_norm, *k_norm, *value_gate, *rope;  // rope [positions, rope_dims / 2, 2]: cos, sin
  Matrix qkv, proj, fc, down;
};
enum Norms { PRE = 0, POST = 1, SANDWICH_SUM = 2, SANDWICH_BRANCH = 3 };
enum Mlp { SWIGLU = 0, RELU2 = 1, GELU = 2 };
enum QkNorm { NONE = 0, FULL = 1, HEAD = 2, HEAD_UNWEIGHTED = 3 };

// AdaLN of a layer: shift, factor and gate of attention, then of the feed-forward layer; stride 0: one for all rows.
struct Modulation {
  const float* part[6];
  int64_t stride[6];
};

static inline float dot(const float* a, const float* b, int width) {
  vf acc[4] = {};
  int i = 0;
  for (; i + 4 * VW <= width; i += 4 * VW)
    for (int j = 0; j < 4; j++) acc[j] += load<vf>(a + i + j * VW) * load<vf>(b + i + j * VW);
  for (; i + VW <= width; i += VW) acc[0] += load<vf>(a + i) * load<vf>(b + i);
  float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; i < width; i++) total += a[i] * b[i];
  return total;
}

// scores [length] -> probabilities times their sum, which is returned; in place.
static inline float soften(float* s, int length, float scale) {
  float most = -INFINITY;
  for (int j = 0; j < length; j++) most = std::max(most, s[j]);
  const float shift = most * scale;
  vf acc = {};
  int j = 0;
  for (; j + VW <= length; j += VW) {
    vf e = exp_(load<vf>(s + j) * scale - shift);
    store(s + j, e);
    acc += e;
  }
  float total = sum(acc);
  for (; j < length; j++) total += s[j] = exp1(s[j] * scale - shift);
  return total;
}

// Queries q [n, ldq] times ``count`` blocks of BW columns -> emit(query, column, values [BW]); in: lines of a block.
template <class Emit>
static inline void columns(int kind, int in, const char* data, int64_t line, int count, const float* q, int64_t ldq,
                           int n, Emit&& emit) {
  const int64_t size = BW * (kind == F32 ? 4 : 2);
  alignas(64) float out[MAX_ROWS * 4 * BW];
  for (int first = 0; first < n; first += MAX_ROWS) {
    const int rows = std::min(MAX_ROWS, n - first), most = blocks_at_once(rows);
    for (int j = 0; j < count;) {
      const int b = j + most <= count ? most : 1;
      micro_of(kind, rows, b > 1)(in, data + j * size, size, line, q + first * ldq, ldq, out, data, 0);
      for (int r = 0; r < rows; r++)
        for (int i = 0; i < b; i++) emit(first + r, (j + i) * BW, out + (r * b + i) * BW);
      j += b;
    }
  }
}

// Rows ``first`` to ``first + n`` of one sequence, one head of keys, and the query heads that share it. Sums run over
// the dimensions of a head, and over the positions of a page and then over pages, however many rows there are.
// own: of a single row whose key is not in the cache, its key and value behind its queries.
static void attend(const Layer& l, const Rows& rows, const Cache& cache, int first, int n, int kv, const float* qkv,
                   int64_t stride, float* mixed) {
  const int width = l.head_dim, group = l.heads / l.kv_heads;
  const int longest = rows.lengths[first + n - 1], wide = (width + BW - 1) / BW;
  const int pages = (longest + PAGE - 1) / PAGE, count = n * group;
  const int64_t lds = int64_t(pages) * PAGE + PAGE, item = cache.kind == F32 ? 4 : 2;
  const int32_t* places = reinterpret_cast<const int32_t*>(rows.tables[first]);
  const bool own = rows.writes[first] < 0;
  static thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < count * (lds + width + wide * BW)) memory.resize(count * (lds + width + wide * BW));
  float *scores = memory.data(), *queries = scores + count * lds, *sums = queries + count * width;
  for (int r = 0; r < n; r++)
    for (int g = 0; g < group; g++)
      memcpy(queries + (r * group + g) * width, qkv + (first + r) * stride + (kv * group + g) * width, width * 4);
  auto page_of = [&](int position) { return int64_t(places[position]) / PAGE; };
  // The positions of a page lie together, unless they took different numbers of steps: f(page, from, to) for each run.
  auto runs = [&](int start, int end, auto&& f) {
    for (int from = start; from < end;) {
      int to = from + 1;
      while (to < end && page_of(to) == page_of(from)) to++;
      f(page_of(from), from, to);
      from = to;
    }
  };
  for (int p = 0; p < pages; p++)
    runs(p * PAGE, std::min(longest, (p + 1) * PAGE), [&](int64_t page, int from, int to) {
      const int low = from % PAGE / BW, high = ((to - 1) % PAGE) / BW + 1;  // blocks of positions that hold the run
      const char* keys = cache.k + (page * l.kv_heads + kv) * width * PAGE * item + low * BW * item;
      columns(cache.kind, width, keys, PAGE * item, high - low, queries, width, count,
              [&](int query, int column, const float* values) {
        const int at = p * PAGE + low * BW + column, begin = std::max(at, from), end = std::min(at + BW, to);
        if (begin < end) memcpy(scores + query * lds + begin, values + begin - at, (end - begin) * 4);
      });
    });
  const float scale = 1.0f / std::sqrt(float(width));
  for (int r = 0; r < n; r++)
    for (int g = 0; g < group; g++) {
      const int query = r * group + g, length = rows.lengths[first + r];
      float* row = scores + query * lds;
      if (own) {  // n is 1
        const float* key = qkv + first * stride + (l.heads + kv) * width;
        float total = 0;
        for (int d = 0; d < width; d++) total = std::fma(queries[query * width + d], key[d], total);
        row[length] = total;
      }
      const float inverse = 1.0f / soften(row, length + own, scale);
      for (int j = 0; j < length + own; j++) row[j] *= inverse;
      for (int j = length + own; j < lds; j++) row[j] = 0;
      float* out = mixed + int64_t(first + r) * l.heads * width + (kv * group + g) * width;
      std::fill(out, out + width, 0.0f);
    }
  for (int p = 0; p < pages; p++) {
    std::fill(sums, sums + count * wide * BW, 0.0f);
    runs(p * PAGE, std::min(longest, (p + 1) * PAGE), [&](int64_t page, int from, int to) {
      const char* values = cache.v + ((page * l.kv_heads + kv) * PAGE + from % PAGE) * cache.value_width * item;
      columns(cache.kind, to - from, values, cache.value_width * item, wide, scores + from, lds, count,
              [&](int query, int column, const float* part) {
        float* to_sum = sums + query * wide * BW + column;
        for (int i = 0; i < BW; i++) to_sum[i] += part[i];
      });
    });
    for (int query = 0; query < count; query++) {
      float* out = mixed + int64_t(first + query / group) * l.heads * width + (kv * group + query % group) * width;
      for (int d = 0; d < width; d++) out[d] += sums[query * wide * BW + d];
    }
  }
  if (own)
    for (int g = 0; g < group; g++) {
      const float *value = qkv + first * stride + (l.heads + l.kv_heads + kv) * width;
      const float p = scores[g * lds + rows.lengths[first]];
      float* out = mixed + int64_t(first) * l.heads * width + (kv * group + g) * width;
      for (int d = 0; d < width; d++) out[d] += p * value[d];
    }
}

// Bias, norm and rotation of a row's queries and keys, gate of its values; the key and value to the cache.
static void finish_qkv(const Layer& l, const Rows& rows, const Cache& cache, int row, float* qkv, const float* input,
                       const float* values) {
  const int width = l.head_dim, both = l.heads + l.kv_heads;
  float *k = qkv + l.heads * width, *v = k + l.kv_heads * width;
  if (l.qk_bias)
    for (int i = 0; i < both * width; i++) qkv[i] += l.qk_bias[i];
  if (l.qk_norm == FULL) {
    rms_norm(qkv, qkv, l.q_norm, l.heads * width, l.qk_eps);
    rms_norm(k, k, l.k_norm, l.kv_heads * width, l.qk_eps);
  } else if (l.qk_norm != NONE) {
    for (int h = 0; h < both; h++)
      rms_norm(qkv + h * width, qkv + h * width, l.qk_norm == HEAD ? (h < l.heads ? l.q_norm : l.k_norm) : nullptr,
               width, l.qk_eps);
  }
  if (l.rope_dims) {
    const float* angle = l.rope + int64_t(rows.positions[row]) * l.rope_dims;
    for (int h = 0; h < both; h++)
      for (int i = 0; i < l.rope_dims; i += 2) {
        float *pair = qkv + h * width + i, re = pair[0], im = pair[1];
        pair[0] = re * angle[i] - im * angle[i + 1];
        pair[1] = re * angle[i + 1] + im * angle[i];
      }
  }
  if (l.value_gate && values)
    for (int h = 0; h < l.kv_heads; h++) {
      const float gate = 2.0f / (1.0f + exp1(-dot(input, l.value_gate + h * l.value_gate_width, l.value_gate_width)));
      for (int i = 0; i < width; i++) v[h * width + i] += gate * values[h * width + i];
    }
  const int64_t place = rows.writes[row];
  if (place < 0) return;
  for (int h = 0; h < l.kv_heads; h++) {
    const int64_t head = place / PAGE * l.kv_heads + h, offset = place % PAGE;
    const int64_t key = head * width * PAGE + offset, value = (head * PAGE + offset) * cache.value_width;
    for (int i = 0; i < width; i++) {
      if (cache.kind == F32) {
        reinterpret_cast<float*>(cache.k)[key + i * PAGE] = k[h * width + i];
        reinterpret_cast<float*>(cache.v)[value + i] = v[h * width + i];
      } else {
        reinterpret_cast<uint16_t*>(cache.k)[key + i * PAGE] = float_to_bf16(k[h * width + i]);
        reinterpret_cast<uint16_t*>(cache.v)[value + i] = float_to_bf16(v[h * width + i]);
      }
    }
  }
}

// x + branch, with the norms and the gate that the layout has.
static void leave(const Layer& l, float* x, float* branch, const float* norm, const Modulation* mod, int part,
                  int row) {
  const int width = l.width;
  if (l.norms == POST || l.norms == SANDWICH_BRANCH) rms_norm(branch, branch, norm, width, l.norm_eps);
  if (mod) {
    const float* gate = mod->part[part + 2] + row * mod->stride[part + 2];
    for (int i = 0; i < width; i++) x[i] += gate[i] * branch[i];
  } else {
    for (int i = 0; i < width; i++) x[i] += branch[i];
  }
  if (l.norms == SANDWICH_SUM) rms_norm(x, x, norm, width, l.norm_eps);
}
static void enter(const Layer& l, float* to, const float* x, const float* norm, const Modulation* mod, int part,
                  int row) {
  if (l.norms != POST)
    rms_norm(to, x, norm, l.width, l.norm_eps);
  else
    memcpy(to, x, l.width * 4);
  if (mod) {
    const float* shift = mod->part[part] + row * mod->stride[part];
    const float* factor = mod->part[part + 1] + row * mod->stride[part + 1];
    for (int i = 0; i < l.width; i++) to[i] = to[i] * factor[i] + shift[i];
  }
}

static float* scratch(int64_t floats) {
  static thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

static void layer(const Layer& l, const Rows& rows, const Cache& cache, float* x, const Modulation* mod,
                  const float* values, int64_t value_stride) {
  const int n = rows.count, D = l.width, attended = l.heads * l.head_dim, kv = l.kv_heads * l.head_dim;
  const int all = attended + 2 * kv + (l.output_gate ? attended : 0);
  const int64_t widest = row_floats(std::max({D, attended, l.mlp_width}));
  float* h = scratch(n * (2 * D + all + attended + l.mlp_width + widest));
  float *branch = h + int64_t(n) * D, *qkv = branch + int64_t(n) * D;
  float *mixed = qkv + int64_t(n) * all, *wide = mixed + int64_t(n) * attended;
  float* rounded = wide + int64_t(n) * l.mlp_width;
  const bool sandwich = l.norms >= SANDWICH_SUM;
  const float *before_a = l.norm[0], *after_a = l.norms == POST ? l.norm[0] : l.norm[1];
  const float *before_m = sandwich ? l.norm[2] : l.norm[1], *after_m = sandwich ? l.norm[3] : l.norm[1];
  static thread_local std::vector<int> starts;  // of the groups of rows that attend together
  starts.clear();
  for (int r = 0; r < n; r++)
    if (r == 0 || rows.tables[r] != rows.tables[r - 1] || rows.writes[r] < 0 || rows.writes[r - 1] < 0 ||
        r - starts.back() == ROWS_TOGETHER ||
        rows.lengths[r] < rows.lengths[r - 1])
      starts.push_back(r);
  const int groups = int(starts.size());
  starts.push_back(n);
  pool().run([&, starts = starts.data()](Worker worker) {
    worker.each(n, [&](int r) { enter(l, h + int64_t(r) * D, x + int64_t(r) * D, before_a, mod, 0, r); });
    product(worker, l.qkv, h, D, n, rounded, Store{l.qkv, qkv, all});
    worker.each(n, [&](int r) {
      finish_qkv(l, rows, cache, r, qkv + int64_t(r) * all, h + int64_t(r) * D,
                 values ? values + r * value_stride : nullptr);
    });
    // Consecutive rows of a sequence read the same keys: up to ROWS_TOGETHER of them are one item.
    worker.each(groups * l.kv_heads, [&](int i) {
      const int group = i % groups, first = starts[group], count = starts[group + 1] - first;
      attend(l, rows, cache, first, count, i / groups, qkv, all, mixed);
    });
    if (l.output_gate)
      worker.each(n, [&](int r) {
        const float* gate = qkv + int64_t(r) * all + attended + 2 * kv;
        for (int d = 0; d < attended; d++) mixed[int64_t(r) * attended + d] *= 1.0f / (1.0f + exp1(-gate[d]));
      });
    product(worker, l.proj, mixed, attended, n, rounded, Store{l.proj, branch, D});
    worker.each(n, [&](int r) {
      leave(l, x + int64_t(r) * D, branch + int64_t(r) * D, after_a, mod, 0, r);
      enter(l, h + int64_t(r) * D, x + int64_t(r) * D, before_m, mod, 3, r);
    });
    if (l.mlp == SWIGLU) {  // a block is VW gates and their VW partners
      product(worker, l.fc, h, D, n, rounded, [&](int row, int block, const float* values) {
        vf gate = load<vf>(values), up = load<vf>(values + VW);
        if (l.fc.bias) gate += load<vf>(l.fc.bias + block * BW), up += load<vf>(l.fc.bias + block * BW + VW);
        const vf y = gate / (1.0f + exp_(-gate)) * up * l.mlp_scale;
        const int first = block * VW, count = std::min(VW, l.mlp_width - first);
        memcpy(wide + int64_t(row) * l.mlp_width + first, &y, count * 4);
      });
    } else {
      product(worker, l.fc, h, D, n, rounded, [&](int row, int block, const float* values) {
        float* to = wide + int64_t(row) * l.mlp_width + block * BW;
        for (int i = 0; i < std::min(BW, l.mlp_width - block * BW); i++) {
          const float y = l.fc.bias ? values[i] + l.fc.bias[block * BW + i] : values[i];
          to[i] = l.mlp_scale *
                  (l.mlp == RELU2 ? (y > 0 ? y * y : 0.0f) : 0.5f * y * (1.0f + std::erf(y * 0.70710678f)));
        }
      });
    }
    product(worker, l.down, wide, l.mlp_width, n, rounded, Store{l.down, branch, D});
    worker.each(n, [&](int r) { leave(l, x + int64_t(r) * D, branch + int64_t(r) * D, after_m, mod, 3, r); });
  });
}

// What a core step does before its layers, and after them: norms, with weights unless norm is null.
enum Injection { KEEP = 0, REPLACE = 1, ADD = 2, LINEAR = 3 };
struct CoreStep {
  int32_t injection;
  float state_scale;
  int32_t norms;
  float eps;
  const float* norm;
  Matrix adapter;  // LINEAR: [width, 2 width], the state first
};

static void inject(const CoreStep& b, float* x, const float* e, int rows, int width) {
  const int64_t all = int64_t(rows) * width;
  if (b.injection == REPLACE) memcpy(x, e, all * 4);
  if (b.injection == ADD)
    for (int64_t i = 0; i < all; i++) x[i] += e[i];
  if (b.injection != LINEAR) return;
  float* both = scratch(2 * all + (quantised(b.adapter.kind) ? rows * row_floats(b.adapter.in) : 0));
  for (int r = 0; r < rows; r++) {
    float *to = both + int64_t(r) * 2 * width, *from = x + int64_t(r) * width;
    for (int i = 0; i < width; i++) to[i] = b.state_scale * from[i];
    memcpy(to + width, e + int64_t(r) * width, width * 4);
  }
  pool().run([&](Worker worker) {
    product(worker, b.adapter, both, 2 * width, rows, both + 2 * all, Store{b.adapter, x, width});
  });
}

extern "C" {

int rdlm_vector_width() { return VW; }
void rdlm_set_threads(int threads) { pool().resize(threads); }

int64_t rdlm_packed_bytes(int in, int out, int kind, int group) {
  return int64_t((out + BW - 1) / BW) * block_bytes(in, kind, group);
}

// weight [out, in] fp32 -> packed as fp32 or bf16. Rows that fill the last block are zeros.
void rdlm_pack(const float* weight, int in, int out, int kind, char* to) {
  const int blocks = (out + BW - 1) / BW;
  pool().run([&](Worker worker) { worker.each(blocks, [&](int block) {
    char* data = to + block * block_bytes(in, kind, 0);
    auto at = [&](int lane, int k) {
      return block * BW + lane < out ? weight[int64_t(block * BW + lane) * in + k] : 0.0f;
    };
    if (kind == F32) {
      for (int k = 0; k < in; k++)
        for (int lane = 0; lane < BW; lane++) reinterpret_cast<float*>(data)[int64_t(k) * BW + lane] = at(lane, k);
    } else {
      uint16_t* halves = reinterpret_cast<uint16_t*>(data);
      for (int k = 0; k < in; k++)
        for (int lane = 0; lane < BW; lane++)  // low half: lane, high half: lane + VW
          halves[int64_t(k) * BW + lane % VW * 2 + lane / VW] = float_to_bf16(at(lane, k));
    }
  }); });
}

// values [out, in] and scales [out, groups] in bf16 -> packed as int8 or int4. What fills up is zeros.
void rdlm_pack_quantised(const int8_t* values, const uint16_t* scales, int in, int out, int kind, int group, char* to) {
  const int blocks = (out + BW - 1) / BW, groups = (in + group - 1) / group;
  pool().run([&](Worker worker) { worker.each(blocks, [&](int block) {
    char* data = to + block * block_bytes(in, kind, group);
    auto at = [&](int lane, int k) {
      return block * BW + lane < out && k < in ? values[int64_t(block * BW + lane) * in + k] : int8_t(0);
    };
    for (int first = 0; first < in; first += UNIT_INPUTS) {
      if (first % group == 0) {
        for (int lane = 0; lane < BW; lane++) {
          const int row = block * BW + lane;
          const uint16_t scale = row < out ? scales[int64_t(row) * groups + first / group] : 0;
          memcpy(data + lane * 2, &scale, 2);
        }
        data += BW * 2;
      }
      for (int k = first; k < first + UNIT_INPUTS; k += kind == INT4 ? 8 : 4)
        for (int lane = 0; lane < BW; lane++)
          for (int i = 0; i < 4; i++)
            *data++ = kind == INT4 ? char((at(lane, k + i) + 8) | (at(lane, k + 4 + i) + 8) << 4)
                                   : char(at(lane, k + i) + INT8_OFFSET);
    }
  }); });
}

// y [rows, out] = x [rows, in] W^T + bias.
void rdlm_linear(const Matrix* m, const float* x, int64_t ldx, int rows, float* y) {
  float* rounded = quantised(m->kind) ? scratch(rows * row_floats(m->in)) : nullptr;
  pool().run([&](Worker worker) { product(worker, *m, x, ldx, rows, rounded, Store{*m, y, m->out}); });
}

void rdlm_rms_norm(const float* x, const float* weight, int rows, int width, float eps, float* y) {
  for (int r = 0; r < rows; r++) rms_norm(y + int64_t(r) * width, x + int64_t(r) * width, weight, width, eps);
}

// Transformer layers one after the other, x [rows, width] in place. cache: of the first one; the next one's keys and
// values lie k_bytes and v_bytes later. mods: one a layer, or null; values: one a layer, each may be null, or null.
// around: injection and norm of a core step with input e [rows, width], which is taken ``steps`` times; or null.
void rdlm_layers(const Layer* const* layers, int count, const Rows* rows, const Cache* cache, int64_t k_bytes,
                 int64_t v_bytes, float* x, const Modulation* mods, const float* const* values, int64_t value_stride,
                 const CoreStep* around, const float* e, int steps) {
  const int n = rows->count, width = layers[0]->width;
  for (int step = 0; step < steps; step++) {
    if (around) inject(*around, x, e, n, width);
    for (int i = 0; i < count; i++) {
      Cache own = *cache;
      own.k += i * k_bytes, own.v += i * v_bytes;
      layer(*layers[i], *rows, own, x, mods ? mods + i : nullptr, values ? values[i] : nullptr, value_stride);
    }
    if (around && around->norms)
      for (int r = 0; r < n; r++) {
        float* row = x + int64_t(r) * width;
        rms_norm(row, row, around->norm, width, around->eps);
      }
  }
}
}
