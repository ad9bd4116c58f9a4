// Host loops that torch cannot express in one pass over memory: `kernels.py` says what each computes, in torch.
//
// A pass goes through memory once and through the cache as often as it likes: a block is widened to fp32, stepped,
// and narrowed, each by a plain loop that the compiler vectorises (a test reads its report). Compiled with
// -ffp-contract=off: what is fused is written `fma`, where torch's own kernels fuse, so that the bits are theirs.
// Callers have checked shapes, dtypes and strides.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
#error "torch's kernels fuse multiplications and additions, which this processor cannot"
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))

namespace {

INLINE float float_of(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
INLINE uint32_t bits_of(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// ---- Sixteen bits --------------------------------------------------------------------------------------------------

struct Bfloat16 {
  static INLINE float load(uint16_t x) { return float_of(uint32_t(x) << 16); }
  static INLINE uint16_t store(float x) { // to nearest, ties to even
    uint32_t bits = bits_of(x), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
  static INLINE float stochastic(float x, uint32_t random) { // as numerics/rounding.py, by 16 random bits
    return x != x ? x : float_of((bits_of(x) + random) & 0xFFFF0000);
  }
};

struct Half {
  static INLINE float load(uint16_t x) {
    uint32_t size = uint32_t(x & 0x7FFF) << 13, sign = uint32_t(x & 0x8000) << 16;
    uint32_t normal = size + (112u << 23), infinite = size | 0x7F800000;
    uint32_t small = bits_of(float_of((113u << 23) + size) - float_of(113u << 23));
    uint32_t finite = size < (1u << 23) ? small : normal;
    return float_of(sign | (size >= (31u << 23) ? infinite : finite));
  }
  static INLINE uint16_t store(float x) { // to nearest, ties to even
    uint32_t bits = bits_of(x), size = bits & 0x7FFFFFFF, sign = bits >> 16 & 0x8000;
    uint32_t normal = (size - (112u << 23) + 0xFFF + (size >> 13 & 1)) >> 13;
    uint32_t small = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
    uint32_t finite = size < (113u << 23) ? small : normal;
    uint32_t large = size > 0x7F800000 ? 0x7E00 : 0x7C00;
    return uint16_t(sign | (size >= (143u << 23) ? large : finite));
  }
  static INLINE float stochastic(float x, uint32_t random) {
    uint32_t bits = bits_of(x);
    float normal = float_of((bits + (random >> 3)) & 0xFFFFE000);
    float size = std::fabs(x) * 0x1p24f, below = std::floor(size);
    float up = float(int32_t(random)) + 0.5f < (size - below) * 0x1p16f ? 1.0f : 0.0f;
    float small = float_of(bits_of((below + up) * 0x1p-24f) | (bits & 0x80000000));
    return x != x ? x : std::fabs(x) < 0x1p-14f ? small : normal;
  }
};

enum Type : int32_t { FLOAT = 1, BFLOAT16 = 2, HALF = 3 };

INLINE int64_t size_of(int32_t type) { return type == FLOAT ? 4 : 2; }
INLINE void *at(void *p, int32_t type, int64_t i) { return static_cast<char *>(p) + i * size_of(type); }
INLINE const void *at(const void *p, int32_t type, int64_t i) { return static_cast<const char *>(p) + i * size_of(type); }

constexpr int64_t BLOCK = 512;  // elements that stay in the first cache, of a few arrays
constexpr int64_t LINE = 16;    // elements that one thread has together: a cache line of fp32

template <class T> void widen_all(const uint16_t *in, float *__restrict out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = T::load(in[i]);
}

template <class T> void narrow_all(const float *in, uint16_t *__restrict out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = T::store(in[i]);
}

template <class T> void scale_all(float *x, float factor, int64_t n) { // and rounded
  for (int64_t i = 0; i < n; i++) x[i] = T::load(T::store(x[i] * factor));
}

void widen(int32_t type, const void *in, float *out, int64_t n) {
  if (type == FLOAT) std::memcpy(out, in, n * 4);
  else if (type == BFLOAT16) widen_all<Bfloat16>(static_cast<const uint16_t *>(in), out, n);
  else widen_all<Half>(static_cast<const uint16_t *>(in), out, n);
}

void narrow(int32_t type, const float *in, void *out, int64_t n) {
  if (type == FLOAT) std::memcpy(out, in, n * 4);
  else if (type == BFLOAT16) narrow_all<Bfloat16>(in, static_cast<uint16_t *>(out), n);
  else narrow_all<Half>(in, static_cast<uint16_t *>(out), n);
}

void round_all(int32_t type, float *x, int64_t n) {
  if (type == BFLOAT16) scale_all<Bfloat16>(x, 1.0f, n);
  else if (type == HALF) scale_all<Half>(x, 1.0f, n);
}

void scale(int32_t type, float *x, float factor, int64_t n) {
  if (factor == 1.0f) return;
  if (type == BFLOAT16) scale_all<Bfloat16>(x, factor, n);
  else if (type == HALF) scale_all<Half>(x, factor, n);
  else for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

double squares(const float *x, int64_t n) {
  double lanes[LINE] = {}; // one sum could not be vectorised
  int64_t i = 0;
  for (; i + LINE <= n; i += LINE)
    for (int64_t lane = 0; lane < LINE; lane++) lanes[lane] += double(x[i + lane]) * double(x[i + lane]);
  double sum = 0;
  for (; i < n; i++) sum += double(x[i]) * double(x[i]);
  for (double lane : lanes) sum += lane;
  return sum;
}

// ---- One parallel region over many tensors -------------------------------------------------------------------------

// body(tensor, begin, end) for blocks of all tensors, every thread on its share of them; `unit` is never cut
template <class F>
void each_block(const int64_t *sizes, int64_t tensors, int64_t unit, int64_t block, int32_t threads, F body) {
  int64_t units = 0;
  for (int64_t t = 0; t < tensors; t++) units += (sizes[t] + unit - 1) / unit;
  if (threads > units) threads = int32_t(units > 1 ? units : 1);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int32_t thread = 0; thread < threads; thread++) {
    int64_t first = units * thread / threads, last = units * (thread + 1) / threads, before = 0;
    for (int64_t t = 0; t < tensors && before < last; t++) {
      int64_t own = (sizes[t] + unit - 1) / unit;
      int64_t begin = first > before ? first - before : 0, end = last - before < own ? last - before : own;
      for (int64_t from = begin * unit; from < end * unit; from += block) {
        int64_t to = from + block < end * unit ? from + block : end * unit;
        body(t, from, to < sizes[t] ? to : sizes[t]);
      }
      before += own;
    }
  }
}

// ---- Adam ----------------------------------------------------------------------------------------------------------

struct Adam {
  float beta2, first, second, root, eps, rate, decay, penalty;
  bool penalized, from_gradient; // the latter: the lerp starts from its nearer end, as torch's
};

Adam adam_of(double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled, double step) {
  Adam a;
  a.beta2 = float(beta2);
  a.first = float(1 - beta1);
  a.second = float(1 - beta2);
  a.root = float(std::sqrt(1 - std::pow(beta2, step)));
  a.eps = float(eps);
  a.rate = float(lr / (1 - std::pow(beta1, step)));
  a.decay = decoupled ? float(1 - lr * weight_decay) : 1.0f;
  a.penalty = float(weight_decay);
  a.penalized = !decoupled && weight_decay != 0;
  a.from_gradient = std::fabs(a.first) >= 0.5f;
  return a;
}

constexpr int64_t TORCH_VECTOR = 8; // torch's kernel steps so many at once; what fills no vector it rounds otherwise

template <bool tail>
void adam_loop(const Adam adam, float *__restrict w, float *__restrict m, float *__restrict v, const float *g,
               int64_t n) {
  const Adam a = adam; // no store can change it
  for (int64_t i = 0; i < n; i++) {
    float gi = a.penalized ? fma(w[i], a.penalty, g[i]) : g[i], wi = w[i] * a.decay, mi = m[i], vi = v[i];
    mi = fma(a.from_gradient ? a.first - 1.0f : a.first, gi - mi, a.from_gradient ? gi : mi);
    vi = tail ? fma(a.beta2, vi, a.second * gi * gi) : fma(a.second * gi, gi, a.beta2 * vi);
    w[i] = wi - a.rate * mi / (std::sqrt(vi) / a.root + a.eps);
    m[i] = mi;
    v[i] = vi;
  }
}

// the tensor's tail begins `whole` elements from here
void adam_block(const Adam &a, float *w, float *m, float *v, const float *g, int64_t n, int64_t whole) {
  int64_t middle = whole < 0 ? 0 : whole < n ? whole : n;
  adam_loop<false>(a, w, m, v, g, middle);
  adam_loop<true>(a, w + middle, m + middle, v + middle, g + middle, n - middle);
}

// ---- Rows ----------------------------------------------------------------------------------------------------------

// steps that a row has missed, in one closed form: numerics/row_adam.py, `catch_up_`
void missed_loop(float *__restrict w, float *__restrict m, float *__restrict v, float decay, float shift, float eps,
                 float first, float second, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    float mi = m[i], vi = v[i];
    w[i] = w[i] * decay - mi / ((std::sqrt(vi) + eps) / shift);
    m[i] = mi * first;
    v[i] = vi * second;
  }
}

void lazy_loop(float *__restrict w, float *__restrict m, float *__restrict v, const float *g, float first, float second,
               float eps, float rate, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    float mi = m[i] + (g[i] - m[i]) * first, vi = v[i] + (g[i] * g[i] - v[i]) * second;
    w[i] = w[i] - rate * (mi / (std::sqrt(vi) + eps));
    m[i] = mi;
    v[i] = vi;
  }
}

bool any(const float *x, int64_t n) { // NaN is something
  int32_t found = 0;
  for (int64_t i = 0; i < n; i++) found |= !(x[i] == 0.0f);
  return found != 0;
}

void add(float *__restrict to, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] += x[i];
}

// body(place in the list, row), every thread on its share of the list; `rows` null: of all `count` rows
template <class F> void each_row(const int64_t *rows, int64_t count, int32_t threads, F body) {
  each_block(&count, 1, 1, 1, threads, [&](int64_t, int64_t i, int64_t) { body(i, rows ? rows[i] : i); });
}

struct Missed { // of each row in the list
  const float *decay, *shift, *eps, *first, *second;
};

// ---- Noise ---------------------------------------------------------------------------------------------------------

enum Distribution : int32_t { POPCOUNT, GAUSSIAN, RADEMACHER };

struct Draw { // which z: numerics/noise.py
  uint32_t key0, key1, parameter, direction;
};

constexpr uint32_t ROUNDING_DOMAIN = 1u << 31;
constexpr int64_t MOST_CALLS = BLOCK / 2; // popcount makes two elements of a call

struct Words {
  uint32_t a[MOST_CALLS], b[MOST_CALLS], c[MOST_CALLS], d[MOST_CALLS];
};

// Philox4x32-10 (Salmon et al., SC 2011) of `n` consecutive calls
void philox(const Draw draw, uint32_t domain, uint64_t call, int64_t n, Words &words) {
  const uint32_t high = uint32_t(call >> 32), low = uint32_t(call);
  for (int64_t i = 0; i < n; i++) {
    uint32_t a = low + uint32_t(i), b = high, c = draw.parameter, d = draw.direction | domain;
#pragma GCC unroll 10
    for (uint32_t turn = 0; turn < 10; turn++) {
      uint64_t of_a = uint64_t(a) * 0xD2511F53u, of_c = uint64_t(c) * 0xCD9E8D57u;
      a = uint32_t(of_c >> 32) ^ b ^ (draw.key0 + turn * 0x9E3779B9u);
      b = uint32_t(of_c);
      c = uint32_t(of_a >> 32) ^ d ^ (draw.key1 + turn * 0xBB67AE85u);
      d = uint32_t(of_a);
    }
    words.a[i] = a;
    words.b[i] = b;
    words.c[i] = c;
    words.d[i] = d;
  }
}

INLINE int32_t bits_set(uint32_t x) {
#ifdef __AVX512VPOPCNTDQ__
  return __builtin_popcount(x);
#else // what other instruction sets vectorise
  x -= x >> 1 & 0x55555555;
  x = (x & 0x33333333) + (x >> 2 & 0x33333333);
  return int32_t(((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101 >> 24);
#endif
}

void popcounts(const Words &words, float *__restrict z, int64_t calls) {
  for (int64_t i = 0; i < calls; i++) {
    z[2 * i] = 0.25f * float(bits_set(words.a[i]) + bits_set(words.b[i]) - 32);
    z[2 * i + 1] = 0.25f * float(bits_set(words.c[i]) + bits_set(words.d[i]) - 32);
  }
}

void signs(const uint32_t *words, int64_t stride, float *__restrict z, int64_t calls) {
  for (int64_t i = 0; i < calls; i++)
    for (uint32_t bit = 0; bit < 32; bit++) z[i * stride + bit] = float(int32_t(words[i] >> bit & 1)) * 2.0f - 1.0f;
}

// within 2 ulp for x in (0, 1]: the polynomial of Cephes' logf (Moshier)
INLINE float logarithm(float x) {
  uint32_t bits = bits_of(x) - bits_of(0.70710678f);
  float e = float(int32_t(bits) >> 23), y = float_of((bits & 0x7FFFFF) + bits_of(0.70710678f)) - 1.0f, square = y * y;
  float p = 7.0376836292e-2f;
  p = fma(p, y, -1.1514610310e-1f);
  p = fma(p, y, 1.1676998740e-1f);
  p = fma(p, y, -1.2420140846e-1f);
  p = fma(p, y, 1.4249322787e-1f);
  p = fma(p, y, -1.6668057665e-1f);
  p = fma(p, y, 2.0000714765e-1f);
  p = fma(p, y, -2.4999993993e-1f);
  p = fma(p, y, 3.3333331174e-1f);
  p = fma(e, -2.12194440e-4f, p * y * square) - 0.5f * square;
  return fma(e, 0.693359375f, y + p);
}

// sine and cosine of x in [0, 2 pi]: Cephes' sinf and cosf
INLINE void wave(float x, float &sine, float &cosine) {
  int32_t octant = (int32_t(x * 1.27323954f) + 1) & ~1;
  float n = float(octant);
  float y = fma(n, -3.77489497744594108e-8f, fma(n, -2.4187564849853515625e-4f, fma(n, -0.78515625f, x)));
  float square = y * y;
  float s = fma(fma(fma(-1.9515295891e-4f, square, 8.3321608736e-3f), square, -1.6666654611e-1f) * square, y, y);
  float c = fma(fma(2.443315711809948e-5f, square, -1.388731625493765e-3f), square, 4.166664568298827e-2f);
  c = fma(c * square, square, fma(-0.5f, square, 1.0f));
  bool swapped = octant & 2;
  float first = swapped ? c : s, second = swapped ? s : c;
  sine = octant & 4 ? -first : first;
  cosine = (octant + 2) & 4 ? -second : second;
}

void normals(const uint32_t *first, const uint32_t *second, float *__restrict z, int64_t calls) {
  for (int64_t i = 0; i < calls; i++) {
    float radius = std::sqrt(-2.0f * logarithm((float(first[i]) + 1.0f) * 0x1p-32f)), sine, cosine;
    wave(float(second[i]) * 1.4629180792671596e-09f, sine, cosine); // 2 pi / 2^32
    z[4 * i] = radius * cosine;
    z[4 * i + 1] = radius * sine;
  }
}

// z of n elements from `first`, a multiple of BLOCK; written up to a whole call
void noise(int32_t distribution, const Draw &draw, int64_t first, int64_t n, float *z) {
  Words words;
  int64_t lanes = distribution == POPCOUNT ? 2 : distribution == GAUSSIAN ? 4 : 128, calls = (n + lanes - 1) / lanes;
  philox(draw, 0, uint64_t(first / lanes), calls, words);
  if (distribution == POPCOUNT) {
    popcounts(words, z, calls);
  } else if (distribution == GAUSSIAN) {
    normals(words.a, words.b, z, calls);
    normals(words.c, words.d, z + 2, calls);
  } else {
    signs(words.a, 128, z, calls);
    signs(words.b, 128, z + 32, calls);
    signs(words.c, 128, z + 64, calls);
    signs(words.d, 128, z + 96, calls);
  }
}

// 16 random bits for each of n elements from `first`
void random_bits(const Draw &draw, int64_t first, int64_t n, uint32_t *__restrict bits) {
  Words words;
  int64_t calls = (n + 7) / 8;
  philox(draw, ROUNDING_DOMAIN, uint64_t(first / 8), calls, words);
  for (int64_t i = 0; i < calls; i++) {
    const uint32_t four[4] = {words.a[i], words.b[i], words.c[i], words.d[i]};
    for (int64_t word = 0; word < 4; word++) {
      bits[8 * i + 2 * word] = four[word] & 0xFFFF;
      bits[8 * i + 2 * word + 1] = four[word] >> 16;
    }
  }
}

template <class T> void round_stochastically(float *__restrict w, const uint32_t *bits, int64_t n) {
  for (int64_t i = 0; i < n; i++) w[i] = T::load(T::store(T::stochastic(w[i], bits[i])));
}

void update(float *__restrict w, const float *z, float coefficient, float lr, float weight_decay, int64_t n) {
  if (weight_decay == 0.0f) // no term of 0 times infinity
    for (int64_t i = 0; i < n; i++) w[i] = w[i] - z[i] * coefficient * lr;
  else
    for (int64_t i = 0; i < n; i++) w[i] = w[i] - (z[i] * coefficient + w[i] * weight_decay) * lr;
}

void perturbed(const float *w, const float *z, float scale, float *__restrict out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = z[i] * scale + w[i];
}

} // namespace

// One step of many tensors. `w` null: of zeros, which are not stored; `shown` null: no copy of the weights.
EXPORT void offload_adam(int64_t tensors, const int64_t *sizes, float **w, float **m, float **v, void **g,
                         void **shown, const double *steps, int32_t gradient_type, int32_t shown_type, double lr,
                         double beta1, double beta2, double eps, double weight_decay, int32_t decoupled,
                         float coefficient, int32_t threads) {
  std::vector<Adam> adams;
  for (int64_t t = 0; t < tensors; t++)
    adams.push_back(adam_of(lr, beta1, beta2, eps, weight_decay, decoupled, steps[t]));
  bool as_it_is = gradient_type == FLOAT && coefficient == 1.0f;
  each_block(sizes, tensors, LINE, BLOCK, threads, [&](int64_t t, int64_t begin, int64_t end) {
    float widened[BLOCK], zeros[BLOCK];
    int64_t n = end - begin, whole = sizes[t] - sizes[t] % TORCH_VECTOR;
    const float *gradient = as_it_is ? static_cast<float *>(g[t]) + begin : widened;
    if (!as_it_is) {
      widen(gradient_type, at(g[t], gradient_type, begin), widened, n);
      scale(gradient_type, widened, coefficient, n);
    }
    float *weight = w ? w[t] + begin : zeros;
    if (!w) std::memset(zeros, 0, n * 4);
    adam_block(adams[t], weight, m[t] + begin, v[t] + begin, gradient, n, whole - begin);
    if (shown) narrow(shown_type, weight, at(shown[t], shown_type, begin), n);
  });
}

// total[rows[i]] += gradient[i] where that is not zero; such rows are touched
EXPORT void offload_add_rows(float *total, uint8_t *touched, const int64_t *rows, int64_t count, int64_t width,
                             const void *gradient, int32_t type, int32_t threads) {
  each_row(rows, count, threads, [&](int64_t i, int64_t row) {
    float widened[BLOCK];
    for (int64_t from = 0; from < width; from += BLOCK) {
      int64_t n = width - from < BLOCK ? width - from : BLOCK;
      widen(type, at(gradient, type, i * width + from), widened, n);
      if (!any(widened, n)) continue;
      add(total + row * width + from, widened, n);
      touched[row] = 1;
    }
  });
}

// Catches rows up (`missed` not null), then steps them: by nothing (0), AdamW or Adam (1), or SparseAdam (2). Gradients
// are in `total`, and zero where `touched` says nothing; both are cleared. `shown` null: no copy of the rows.
EXPORT void offload_step_rows(float *w, float *m, float *v, float *total, uint8_t *touched, void *shown,
                              int32_t shown_type, const int64_t *rows, int64_t count, int64_t width,
                              const Missed *missed, int32_t way, double step, double lr, double beta1, double beta2,
                              double eps, double weight_decay, int32_t decoupled, float coefficient,
                              int32_t threads) {
  Adam a = adam_of(lr, beta1, beta2, eps, weight_decay, decoupled, step);
  float lazy_rate = float(lr * std::sqrt(1 - std::pow(beta2, step)) / (1 - std::pow(beta1, step)));
  each_row(rows, count, threads, [&](int64_t i, int64_t row) {
    float gradient[BLOCK];
    for (int64_t from = 0; from < width; from += BLOCK) {
      int64_t n = width - from < BLOCK ? width - from : BLOCK, here = row * width + from;
      if (missed && missed->first[i] != 1.0f) // 1: none
        missed_loop(w + here, m + here, v + here, missed->decay[i], missed->shift[i], missed->eps[i], missed->first[i],
                    missed->second[i], n);
      if (way) {
        if (touched[row]) {
          std::memcpy(gradient, total + here, n * 4);
          scale(FLOAT, gradient, coefficient, n);
          std::memset(total + here, 0, n * 4);
        } else {
          std::memset(gradient, 0, n * 4);
        }
        if (way == 1) adam_loop<false>(a, w + here, m + here, v + here, gradient, n);
        else lazy_loop(w + here, m + here, v + here, gradient, a.first, a.second, a.eps, lazy_rate, n);
      }
      if (shown) narrow(shown_type, w + here, at(shown, shown_type, here), n);
    }
    if (way) touched[row] = 0;
  });
}

// Updates of one weight in order, each rounded to its type, then up to two copies w + scale z: numerics/zeroth.py
EXPORT void offload_advance(void *weight, int32_t type, int64_t numel, int32_t distribution, int64_t updates,
                            const Draw *draws, const float *coefficients, const float *rates, const float *decays,
                            int32_t stochastic, const Draw *shown, int64_t copies, const float *scales, void **outs,
                            const int32_t *out_types, int32_t threads) {
  each_block(&numel, 1, BLOCK, BLOCK, threads, [&](int64_t, int64_t begin, int64_t end) {
    float w[BLOCK], z[BLOCK], out[BLOCK];
    uint32_t bits[BLOCK];
    int64_t n = end - begin;
    widen(type, at(weight, type, begin), w, n);
    for (int64_t u = 0; u < updates; u++) {
      noise(distribution, draws[u], begin, n, z);
      update(w, z, coefficients[u], rates[u], decays[u], n);
      if (type == FLOAT) continue;
      if (!stochastic) {
        round_all(type, w, n);
        continue;
      }
      random_bits(draws[u], begin, n, bits);
      if (type == BFLOAT16) round_stochastically<Bfloat16>(w, bits, n);
      else round_stochastically<Half>(w, bits, n);
    }
    if (updates) narrow(type, w, at(weight, type, begin), n);
    if (copies) noise(distribution, *shown, begin, n, z);
    for (int64_t c = 0; c < copies; c++) {
      perturbed(w, z, scales[c], out, n);
      narrow(out_types[c], out, at(outs[c], out_types[c], begin), n);
    }
  });
}

// Sum of squares, which is not finite where an element is not
EXPORT double offload_square_sum(const void *x, int32_t type, int64_t numel, int32_t threads) {
  std::vector<double> sums(size_t(numel / (BLOCK * BLOCK) + 1)); // added in the same order by any number of threads
  each_block(&numel, 1, BLOCK * BLOCK, BLOCK * BLOCK, threads, [&](int64_t, int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t from = begin; from < end; from += BLOCK) {
      float widened[BLOCK];
      int64_t n = end - from < BLOCK ? end - from : BLOCK;
      widen(type, at(x, type, from), widened, n);
      sum += squares(widened, n);
    }
    sums[size_t(begin / (BLOCK * BLOCK))] = sum;
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}
