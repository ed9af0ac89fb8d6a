/* The update codes of codes.py on one thread, the same bits. Compiled by codes_native.py with -ffp-contract=off. */
#include "../cpu_backend/native.c"

typedef struct {
  float lr, decay, other_decay; /* other_decay: where the step does not go towards zero; 1 under cautious weight decay */
  int type;       /* of the parameters */
  int radix;      /* 3: replicas hold all that the update read; 6: main params are hidden */
  int power;      /* what a digit is multiplied by in its byte */
  int draws_bits; /* bf16 parameters are rounded stochastically; keys as in Scalars */
  uint32_t key_1, key_2;
} Piece;

enum { ESCAPE = 255 };

static inline int32_t ordered(uint32_t bits16) {
  int32_t x = (int16_t)bits16;
  return x ^ ((x >> 15) & 0x7FFF);
}
static inline uint32_t from_ordered(int32_t x) { return (uint32_t)(x ^ ((x >> 15) & 0x7FFF)) & 0xFFFFu; }
static inline float half_to_float(uint32_t bits16) { _Float16 x; uint16_t u = (uint16_t)bits16; memcpy(&x, &u, 2); return (float)x; }
static inline uint32_t float_to_half(float x) { _Float16 h = (_Float16)x; uint16_t u; memcpy(&u, &h, 2); return u; }
static inline float widen(uint32_t bits16, int type) { return type == BF16 ? float_of(bits16 << 16) : half_to_float(bits16); }
static inline uint32_t narrow(float x, int type) { return type == BF16 ? (quiet_bits(x) + 0x8000u) >> 16 : float_to_half(x); }
static inline float least_main(float magnitude, int type) {
  int32_t bits = (int32_t)bits_of(magnitude) - (type == BF16 ? 0x8000 : 0x1000);
  return float_of((uint32_t)(bits < 0 ? 0 : bits));
}
static inline int is_nan16(uint32_t bits16, int type) { return (bits16 & 0x7FFFu) > (type == BF16 ? 0x7F80u : 0x7C00u); }

/* (byte / power) % radix: 65536 / power rounded up divides any byte exactly, for powers up to 81. */
static void take_digits(uint8_t *restrict out, const uint8_t *restrict packed, uint32_t power, uint32_t radix, int64_t n) {
  const uint32_t by_power = (65536u + power - 1) / power, by_radix = (65536u + radix - 1) / radix;
  EACH {
    uint32_t q = (packed[i] * by_power) >> 16;
    out[i] = (uint8_t)(q - radix * ((q * by_radix) >> 16));
  }
}

/* ---- six digits */

static inline void encode_six(uint8_t *restrict digits, const uint16_t *restrict old, const uint16_t *restrict new,
                              float lr, float decay, float other, const int type, int64_t n) {
  EACH {
    uint32_t sign = old[i] & 0x8000u;
    float x = widen(old[i] & 0x7FFFu, type), low = least_main(x, type);
    int32_t away = ordered(narrow(low * other + lr, type)), towards = ordered(narrow(low * decay - lr, type));
    int32_t stay = ordered(narrow(x * other, type)), now = ordered(new[i] ^ sign);
    uint32_t d = ESCAPE;
    d = now == stay ? 5 : d;
    d = now == towards + 2 ? 4 : d;
    d = now == towards + 1 ? 3 : d;
    d = now == towards ? 2 : d;
    d = now == away + 1 ? 1 : d;
    d = now == away ? 0 : d;
    digits[i] = (uint8_t)(is_nan16(new[i], type) | is_nan16(old[i], type) ? ESCAPE : d);
  }
}

static inline void replay_six(uint16_t *restrict params, const uint8_t *restrict digits, float lr, float decay,
                              float other, const int type, int64_t n) {
  EACH {
    uint32_t sign = params[i] & 0x8000u;
    int32_t d = digits[i], base = d < 2 ? 0 : d < 5 ? 2 : 5;
    float x = widen(params[i] & 0x7FFFu, type), start = d == 5 ? x : least_main(x, type);
    float step = d < 2 ? -lr : d < 5 ? lr : 0.f, factor = (d >= 2) & (d < 5) ? decay : other;
    params[i] = (uint16_t)(from_ordered(ordered(narrow(start * factor - step, type)) + d - base) ^ sign);
  }
}

/* ---- three digits */

/* A parameter before a step of this sign: decayed, and by the other factor where the step has another sign than it. */
static inline float decayed(float x, int sign, float decay, float other) {
  return x * (((sign > 0) & (x > 0.f)) | ((sign < 0) & (x < 0.f)) ? decay : other);
}
static inline uint32_t stochastic(float x, uint32_t random) { return (quiet_bits(x) + (random & 0xFFFFu)) >> 16; }

static void encode_three_fp32(uint8_t *restrict digits, const uint32_t *restrict old, const uint32_t *restrict new,
                              float lr, float decay, float other, int64_t n) {
  EACH {
    float x = float_of(old[i]);
    uint32_t d = ESCAPE;
    d = bits_of(decayed(x, 1, decay, other) - lr) == new[i] ? 2 : d;
    d = bits_of(x * other - 0.f * lr) == new[i] ? 1 : d;
    d = bits_of(decayed(x, -1, decay, other) + lr) == new[i] ? 0 : d;
    digits[i] = (uint8_t)((new[i] & 0x7FFFFFFFu) > 0x7F800000u ? ESCAPE : d);
  }
}

static void encode_three_bf16(uint8_t *restrict digits, const uint16_t *restrict old, const uint16_t *restrict new,
                              const uint32_t *restrict random, float lr, float decay, float other, int64_t n) {
  EACH {
    float x = float_of((uint32_t)old[i] << 16);
    uint32_t d = ESCAPE;
    d = stochastic(decayed(x, 1, decay, other) - lr, random[i]) == new[i] ? 2 : d;
    d = stochastic(x * other - 0.f * lr, random[i]) == new[i] ? 1 : d;
    d = stochastic(decayed(x, -1, decay, other) + lr, random[i]) == new[i] ? 0 : d;
    digits[i] = (uint8_t)(is_nan16(new[i], BF16) ? ESCAPE : d);
  }
}

static void replay_three_fp32(float *restrict params, const uint8_t *restrict digits, float lr, float decay,
                              float other, int64_t n) {
  EACH { int sign = (int)digits[i] - 1; params[i] = decayed(params[i], sign, decay, other) - (float)sign * lr; }
}

static void replay_three_bf16(uint16_t *restrict params, const uint8_t *restrict digits, const uint32_t *restrict random,
                              float lr, float decay, float other, int64_t n) {
  EACH {
    int sign = (int)digits[i] - 1;
    float x = decayed(float_of((uint32_t)params[i] << 16), sign, decay, other) - (float)sign * lr;
    params[i] = (uint16_t)stochastic(x, random[i]);
  }
}

/* ---- pieces. old, new, params: numel elements; packed: their bytes; index: global element index of the first element;
 * first: its place in the shard. Escapes are written from *count on, and counted beyond the capacity too. */

void lion_encode(const char *old, const char *new, uint8_t *packed, const Piece *p, uint64_t index, int64_t numel,
                 int32_t first, int32_t *escape_index, char *escape_bits, int32_t capacity, int32_t *count) {
  const int64_t size = SIZE[p->type];
  uint8_t digits[BLOCK];
  uint32_t random[BLOCK];
  Scalars keys = {.key_1 = p->key_1, .key_2 = p->key_2};
  for (int64_t start = 0; start < numel; start += BLOCK) {
    const int64_t n = numel - start < BLOCK ? numel - start : BLOCK;
    const void *o = old + start * size, *x = new + start * size;
    if (p->draws_bits) draw_bits(random, index + (uint64_t)start, &keys, n);
    if (p->radix == 6 && p->type == BF16) encode_six(digits, o, x, p->lr, p->decay, p->other_decay, BF16, n);
    else if (p->radix == 6) encode_six(digits, o, x, p->lr, p->decay, p->other_decay, FP16, n);
    else if (p->type == FP32) encode_three_fp32(digits, o, x, p->lr, p->decay, p->other_decay, n);
    else encode_three_bf16(digits, o, x, random, p->lr, p->decay, p->other_decay, n);

    uint8_t escapes = 0;
    EACH escapes |= digits[i] == ESCAPE;
    if (escapes) {
      EACH if (digits[i] == ESCAPE) {
        digits[i] = 0;
        if (*count < capacity) {
          escape_index[*count] = first + (int32_t)(start + i);
          memcpy(escape_bits + *count * size, (const char *)x + i * size, size);
        }
        ++*count;
      }
    }
    uint8_t *bytes = packed + start;
    const uint8_t power = (uint8_t)p->power;
    EACH bytes[i] = (uint8_t)(bytes[i] + digits[i] * power);
  }
}

void lion_replay(char *params, const uint8_t *packed, const Piece *p, uint64_t index, int64_t numel) {
  uint8_t digits[BLOCK];
  uint32_t random[BLOCK];
  Scalars keys = {.key_1 = p->key_1, .key_2 = p->key_2};
  for (int64_t start = 0; start < numel; start += BLOCK) {
    const int64_t n = numel - start < BLOCK ? numel - start : BLOCK;
    void *x = params + start * SIZE[p->type];
    take_digits(digits, packed + start, (uint32_t)p->power, (uint32_t)p->radix, n);
    if (p->draws_bits) draw_bits(random, index + (uint64_t)start, &keys, n);
    if (p->radix == 6 && p->type == BF16) replay_six(x, digits, p->lr, p->decay, p->other_decay, BF16, n);
    else if (p->radix == 6) replay_six(x, digits, p->lr, p->decay, p->other_decay, FP16, n);
    else if (p->type == FP32) replay_three_fp32(x, digits, p->lr, p->decay, p->other_decay, n);
    else replay_three_bf16(x, digits, random, p->lr, p->decay, p->other_decay, n);
  }
}
