/* The Lion step of reference.py on one thread, the same bits. Compiled by native.py with -ffp-contract=off.
 *
 * Blocks of BLOCK elements pass through three stages in the L1 cache: read to fp32, update, store. Each stage is one
 * plain loop per storage type, which the compiler vectorizes; memory is read once and written once.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 1024
#define EACH for (int64_t i = 0; i < n; i++)

enum { FP32 = 0, BF16 = 1, FP16 = 2, INT16 = 3, NONE = 4 };
enum { NEAREST = 0, STOCHASTIC = 1 };

typedef struct {
  float lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, grad_scale;
  float disagreeing_lr; /* of the cautious step, where update and gradient differ in sign; lr is for the others */
  float ema_decay, one_minus_ema_decay; /* of the average of the weights, if there is one */
  uint32_t key_1, key_2; /* of this step: reference.random_keys */
  int32_t rule;          /* which terms the step has beyond the plain one: CAUTIOUS | CAUTIOUS_DECAY */
} Scalars;

enum { CAUTIOUS = 1, CAUTIOUS_DECAY = 2 };

static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
static inline int same_sign(float a, float b) { return ((a > 0.f) & (b > 0.f)) | ((a < 0.f) & (b < 0.f)); }
/* The bits of x; a NaN's such that what is added to the lower half does not carry out of it. */
static inline uint32_t quiet_bits(float x) { return x == x ? bits_of(x) : 0x7FC00000u; }

static void read_fp32(float *restrict out, const void *restrict in, int type, int64_t n) {
  if (type == FP32) {
    memcpy(out, in, 4 * n);
  } else if (type == BF16) {
    const uint16_t *x = in;
    EACH out[i] = float_of((uint32_t)x[i] << 16);
  } else {
    const _Float16 *x = in;
    EACH out[i] = (float)x[i];
  }
}

/* A remainder below 0 goes with no zero: reference.join_main. */
static void read_split(float *restrict out, const uint16_t *restrict upper, const int16_t *restrict rest, int64_t n) {
  EACH {
    int32_t remainder = rest[i];
    remainder = (upper[i] & 0x7FFFu) == 0 && remainder < 0 ? 0 : remainder;
    out[i] = float_of(((uint32_t)upper[i] << 16) + (uint32_t)remainder);
  }
}

static void draw_bits(uint32_t *restrict out, uint64_t index, const Scalars *s, int64_t n) {
  EACH {
    uint64_t at = index + (uint64_t)i;
    uint32_t x = (uint32_t)at ^ s->key_1;
    x = (x ^ (x >> 17)) * 0xED5AD4BBu + s->key_2 + (uint32_t)(at >> 32) * 0x9E3779B9u;
    x = (x ^ (x >> 11)) * 0xAC4C1B51u;
    x = (x ^ (x >> 15)) * 0x31848BABu;
    out[i] = x ^ (x >> 14);
  }
}

/* An element whose gradient is not finite keeps its values: rounding them again gives the bits they had. */
static inline __attribute__((always_inline)) void update_by(
    float *restrict p, float *restrict m, const float *restrict g, uint32_t *restrict finite, const Scalars *s,
    int64_t n, const int rule) {
  const float lr = s->lr, decay = s->decay, b1 = s->beta1, a1 = s->one_minus_beta1, b2 = s->beta2,
              a2 = s->one_minus_beta2, other_lr = s->disagreeing_lr;
  EACH {
    float c = m[i] * b1 + g[i] * a1;
    float sign = (c > 0.f ? 1.f : 0.f) - (c < 0.f ? 1.f : 0.f);
    float step = sign * lr, decayed = p[i] * decay;
    if (rule & CAUTIOUS) step = same_sign(c, g[i]) ? step : sign * other_lr;
    if (rule & CAUTIOUS_DECAY) decayed = same_sign(step, p[i]) ? decayed : p[i];
    float new_p = decayed - step, new_m = m[i] * b2 + g[i] * a2;
    int ok = fabsf(g[i]) <= FLT_MAX;
    p[i] = ok ? new_p : p[i];
    m[i] = ok ? new_m : m[i];
    finite[i] = ok;
  }
}

/* One loop for each rule: the plain step asks for none. */
static void update(float *restrict p, float *restrict m, const float *restrict g, uint32_t *restrict finite,
                   const Scalars *s, int64_t n) {
  switch (s->rule) {
    case CAUTIOUS: update_by(p, m, g, finite, s, n, CAUTIOUS); break;
    case CAUTIOUS_DECAY: update_by(p, m, g, finite, s, n, CAUTIOUS_DECAY); break;
    case CAUTIOUS | CAUTIOUS_DECAY: update_by(p, m, g, finite, s, n, CAUTIOUS | CAUTIOUS_DECAY); break;
    default: update_by(p, m, g, finite, s, n, 0);
  }
}

static void store_half_up(uint16_t *restrict out, const float *restrict x, int64_t n) {
  EACH out[i] = (uint16_t)((quiet_bits(x[i]) + 0x8000u) >> 16);
}

static void store_nearest_even(uint16_t *restrict out, const float *restrict x, int64_t n) {
  EACH { uint32_t u = quiet_bits(x[i]); out[i] = (uint16_t)((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16); }
}

static void store_stochastic(uint16_t *restrict out, const float *restrict x, const uint32_t *restrict random,
                             int shift, int64_t n) {
  EACH out[i] = (uint16_t)((quiet_bits(x[i]) + ((random[i] >> shift) & 0xFFFFu)) >> 16);
}

static void store_remainder(int16_t *restrict out, const float *restrict x, int64_t n) {
  EACH out[i] = (int16_t)(uint16_t)quiet_bits(x[i]);
}

/* The copy that the model reads; where the gradient is not finite it stays, whatever its main param is. */
static void store_copy(void *restrict out, int type, const float *restrict x, const uint32_t *restrict finite, int64_t n) {
  if (type == BF16) {
    uint16_t *o = out;
    EACH { uint16_t r = (uint16_t)((quiet_bits(x[i]) + 0x8000u) >> 16); o[i] = finite[i] ? r : o[i]; }
  } else {
    _Float16 *o = out;
    EACH { _Float16 r = (_Float16)x[i]; o[i] = finite[i] ? r : o[i]; }
  }
}

/* reference.average_bits, in place. */
static void hash_again(uint32_t *restrict random, int64_t n) {
  EACH {
    uint32_t x = random[i] ^ 0x9E3779B9u;
    x = (x ^ (x >> 17)) * 0xED5AD4BBu;
    x = (x ^ (x >> 11)) * 0xAC4C1B51u;
    x = (x ^ (x >> 15)) * 0x31848BABu;
    random[i] = x ^ (x >> 14);
  }
}

/* reference.update_average of the new weights w; random: of the step, in a bf16 average's hands from here on. */
static void update_average(char *restrict average, int type, float *restrict block, const float *restrict w,
                           const uint32_t *restrict finite, uint32_t *restrict random, const Scalars *s, int64_t n) {
  const float decay = s->ema_decay, rest = s->one_minus_ema_decay;
  float *restrict a = type == FP32 ? (float *)average : block;
  if (type == BF16) read_fp32(a, average, BF16, n);
  EACH { float moved = a[i] * decay + w[i] * rest; a[i] = finite[i] ? moved : a[i]; }
  if (type == BF16) {
    hash_again(random, n);
    store_stochastic((uint16_t *)average, a, random, 0, n);
  }
}

static const int64_t SIZE[] = {4, 2, 2, 2, 0};

/* The gradient as the step reads it: where it is in memory, or in fp32 and scaled in a block of scratch. */
static const float *read_grad(float *restrict block, const char *grad, int type, float scale, int64_t n) {
  if (type == FP32 && scale == 1.0f) return (const float *)grad;
  read_fp32(block, grad, type, n);
  if (scale != 1.0f) EACH block[i] *= scale;
  return block;
}

/* n elements of one tensor; index: global element index of the first. main_type or average_type NONE: there are none.
 * What is fp32 in memory is updated where it is, the rest in a block's worth of scratch. */
void lion_update(char *param, char *main, char *exp_avg, const char *grad, char *average, int param_type, int main_type,
                 int exp_avg_type, int grad_type, int average_type, int momentum_rounding, const Scalars *s,
                 uint64_t index, int64_t numel) {
  float p_block[BLOCK], m_block[BLOCK], g_block[BLOCK];
  uint32_t finite[BLOCK], random[BLOCK];
  const int rounds_param = param_type == BF16 && main_type == NONE;
  const int draws = rounds_param || momentum_rounding == STOCHASTIC || average_type == BF16;
  for (int64_t start = 0; start < numel; start += BLOCK) {
    const int64_t n = numel - start < BLOCK ? numel - start : BLOCK;
    float *p = main_type == FP32 ? (float *)main : param_type == FP32 ? (float *)param : p_block;
    float *m = exp_avg_type == FP32 ? (float *)exp_avg : m_block;
    const float *g = read_grad(g_block, grad, grad_type, s->grad_scale, n);
    if (main_type == INT16) read_split(p, (const uint16_t *)param, (const int16_t *)main, n);
    else if (p == p_block) read_fp32(p, param, param_type, n);
    if (m == m_block) read_fp32(m, exp_avg, exp_avg_type, n);

    update(p, m, g, finite, s, n);
    if (draws) draw_bits(random, index + (uint64_t)start, s, n);

    if (m == m_block) {
      if (momentum_rounding == STOCHASTIC) store_stochastic((uint16_t *)exp_avg, m, random, 16, n);
      else store_nearest_even((uint16_t *)exp_avg, m, n);
    }
    if (main_type == INT16) {
      store_remainder((int16_t *)main, p, n);
      store_half_up((uint16_t *)param, p, n);
    } else if (main_type == FP32) {
      store_copy(param, param_type, p, finite, n);
    } else if (rounds_param) {
      store_stochastic((uint16_t *)param, p, random, 0, n);
    }
    if (average_type != NONE) {
      if (rounds_param) read_fp32(p, param, BF16, n); /* as it is stored */
      update_average(average, average_type, m_block, p, finite, random, s, n);
    }
    param += n * SIZE[param_type];
    main += n * SIZE[main_type];
    exp_avg += n * SIZE[exp_avg_type];
    grad += n * SIZE[grad_type];
    average += n * SIZE[average_type];
  }
}

/* reference.count_aligned of n elements of one tensor. */
int64_t lion_count_aligned(const char *exp_avg, const char *grad, int exp_avg_type, int grad_type, const Scalars *s,
                           int64_t numel) {
  float m_block[BLOCK], g_block[BLOCK];
  const float b1 = s->beta1, a1 = s->one_minus_beta1;
  int64_t total = 0;
  for (int64_t start = 0; start < numel; start += BLOCK) {
    const int64_t n = numel - start < BLOCK ? numel - start : BLOCK;
    const float *g = read_grad(g_block, grad, grad_type, s->grad_scale, n), *m = (const float *)exp_avg;
    if (exp_avg_type != FP32) {
      read_fp32(m_block, exp_avg, exp_avg_type, n);
      m = m_block;
    }
    int32_t count = 0;
    EACH {
      float c = m[i] * b1 + g[i] * a1;
      count += same_sign(c, g[i]) & (fabsf(g[i]) <= FLT_MAX);
    }
    total += count;
    exp_avg += n * SIZE[exp_avg_type];
    grad += n * SIZE[grad_type];
  }
  return total;
}
