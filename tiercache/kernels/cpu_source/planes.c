/* Entry points: cut a product into items, give them to the team, run the path that this file was compiled for. */
#include <stdlib.h>

#include "generic.h"
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FAST 1
#include "avx512_down.h"
#else
#define FAST 0
#endif

#ifdef __GNUC__
#define EXPORT __attribute__((visibility("default")))
#else
#define EXPORT
#endif

#define FEW_ROWS 64 /* rows of one item when there are few tokens */

#if FAST
static int fast(const Shape *s) { return s->group >= 64; }
#endif

/* Bytes of what `tc_prepare` fills. */
EXPORT int64_t tc_prepared_bytes(int32_t tokens, int32_t columns, int32_t group) {
    const Shape s = shape_of(columns, group);
    return (int64_t)tokens * s.parts * (2 * s.part + 2 * (int64_t)sizeof(float));
}

typedef struct {
    const Input *x;
    Prepared to;
    Shape shape;
    int32_t columns;
} Preparation;

static void prepare_token(void *context, int64_t token) {
    const Preparation *job = context;
    const Shape *s = &job->shape;
    const int64_t width = (int64_t)s->parts * s->part;
    float row[512]; /* four groups of 128 at a time */
    for (int32_t first = 0; first < s->parts; first += 512 / s->part) {
        const int64_t at = (int64_t)first * s->part, left = job->columns - at;
        const int64_t count = left < 0 ? 0 : left < 512 ? left : 512;
        memset(row, 0, sizeof row);
        if (count) load_row(job->x, token, at, count, row);
        const int32_t last = first + 512 / s->part < s->parts ? first + 512 / s->part : s->parts;
        for (int32_t p = first; p < last; p++) {
#if FAST
            if (fast(s)) {
                prepare_part(row - at, s, p, token, &job->to);
                continue;
            }
#endif
            float values[64];
            int32_t total;
            for (int32_t i = 0; i < s->part; i++) values[i] = row[column_of(s, p, i) - at];
            const float scale = quantise(values, s->part, job->to.whole + token * width + (int64_t)p * s->part, &total);
            job->to.scale[token * s->parts + p] = scale;
            job->to.sum[token * s->parts + p] = scale * (float)total;
        }
    }
}

/* Quantise activations into `memory`, of `tc_prepared_bytes`, at a multiple of 64. */
EXPORT void tc_prepare(const Input *x, int32_t columns, int32_t group, int32_t few, void *memory, const Team *team) {
    const Shape s = shape_of(columns, group);
    Preparation job = {x, prepared_at(memory, x->tokens, few, &s), s, columns};
    Team alone = *team;
    if ((int64_t)x->tokens * columns < 1 << 15) alone.threads = 1; /* waking a thread takes as long */
    share(&alone, prepare_token, &job, x->tokens);
}

typedef struct {
    const Matrix *matrix;
    Prepared x;
    const Input *input; /* of `tc_product_down` */
    Shape shape;
    float *out;
    int64_t stride;
    int32_t chunks; /* of a strip */
    int64_t strips;
} Job;

#define BY_SHAPE(call)                                                                              \
    switch (m->planes * 1000 + s->group) {                                                          \
        case 1064: { enum { PLANES = 1, GROUP = 64 }; call; break; }                                \
        case 2064: { enum { PLANES = 2, GROUP = 64 }; call; break; }                                \
        case 3064: { enum { PLANES = 3, GROUP = 64 }; call; break; }                                \
        case 1128: { enum { PLANES = 1, GROUP = 128 }; call; break; }                               \
        case 2128: { enum { PLANES = 2, GROUP = 128 }; call; break; }                               \
        case 3128: { enum { PLANES = 3, GROUP = 128 }; call; break; }                               \
    }

static void product_few(void *context, int64_t item) {
    const Job *job = context;
    const Matrix *m = job->matrix;
    const Shape *s = &job->shape;
    const int64_t first = item * FEW_ROWS, last = first + FEW_ROWS < m->rows ? first + FEW_ROWS : m->rows;
#if FAST
    if (fast(s)) {
        BY_SHAPE(few_rows(m, PLANES, GROUP, &job->x, s, first, last, job->out, job->stride))
        return;
    }
#endif
    for (int64_t row = first; row < last; row++) generic_row(m, &job->x, s, row, job->out, job->stride);
}

#if FAST
static void product_many(void *context, int64_t item) {
    const Job *job = context;
    const Matrix *m = job->matrix;
    const Shape *s = &job->shape;
    const int64_t blocks = (m->rows + 31) / 32, token = item / blocks * STRIP, left = job->x.tokens - token;
    const int tokens = left < STRIP ? (int)left : STRIP;
    BY_SHAPE(many_rows(m, PLANES, GROUP, &job->x, s, item % blocks * 32, token, tokens, job->out, job->stride))
}
#endif

static Job job_of(const Matrix *m, int32_t tokens, int32_t few, void *prepared, float *out, int64_t stride) {
    const Shape s = shape_of(m->columns, m->group);
    Job job = {m, prepared_at(prepared, tokens, few, &s), NULL, s, out, stride, 0, 0};
    return job;
}

static void run_product(Job *job, const Team *team) {
    const int64_t rows = job->matrix->rows;
#if FAST
    if (fast(&job->shape) && !job->x.few) {
        share(team, product_many, job, (rows + 31) / 32 * ((job->x.tokens + STRIP - 1) / STRIP));
        return;
    }
#endif
    share(team, product_few, job, (rows + FEW_ROWS - 1) / FEW_ROWS);
}

/* out[t * stride + i] += row i of the matrix times token t; `few` as it was prepared. */
EXPORT void tc_product(const Matrix *m, int32_t tokens, int32_t few, void *prepared, float *out, int64_t stride,
                       const Team *team) {
    Job job = job_of(m, tokens, few, prepared, out, stride);
    if (m->rows && tokens) run_product(&job, team);
}

static void down_part(void *context, int64_t item) {
    const Job *job = context;
    generic_down(job->matrix, job->input, &job->shape, (int32_t)item, job->out, job->stride);
}

#if FAST
static void down_few(void *context, int64_t item) {
    const Job *job = context;
    const Matrix *m = job->matrix;
    const Shape *s = &job->shape;
    const Strip strip = strip_at(s, item, job->chunks);
    BY_SHAPE(few_down(m, PLANES, GROUP, job->input, s, strip, job->out, job->stride))
}

static void down_many(void *context, int64_t item) {
    const Job *job = context;
    const Matrix *m = job->matrix;
    const Shape *s = &job->shape;
    const Strip strip = strip_at(s, item % job->strips, job->chunks);
    const int64_t token = item / job->strips * SPAN, left = job->input->tokens - token;
    const int tokens = left < SPAN ? (int)left : SPAN;
    BY_SHAPE(many_down(m, PLANES, GROUP, job->input, s, strip, token, tokens, job->out, job->stride))
}
#endif

static void run_down(Job *job, int32_t few, const Team *team) {
    const Shape *s = &job->shape;
#if FAST
    if (fast(s)) {
        job->chunks = WIDE; /* narrower only to have work for all: strips share cache lines of scales */
        while (job->chunks > 1 && (s->chunks + job->chunks - 1) / job->chunks < 2 * team->threads) job->chunks /= 2;
        job->strips = (s->chunks + job->chunks - 1) / job->chunks;
        const int64_t spans = few ? 1 : (job->input->tokens + SPAN - 1) / SPAN;
        share(team, few ? down_few : down_many, job, job->strips * spans);
        return;
    }
#endif
    (void)few;
    share(team, down_part, job, s->real_parts);
}

/* out[t * stride + c] += sum over rows i of x[t][i] * matrix[i][c]. `few`: at most 8 tokens, one after another. */
EXPORT void tc_product_down(const Matrix *m, const Input *x, int32_t few, float *out, int64_t stride,
                            const Team *team) {
    Job job = job_of(m, x->tokens, few, NULL, out, stride);
    job.input = x;
    if (m->rows && x->tokens) run_down(&job, few, team);
}

enum { SILU, GELU, GELU_TANH, RELU, RELU2, IDENTITY };

static float activate(int32_t kind, float x) {
    switch (kind) {
        case SILU: return x / (1.0f + expf(-x));
        case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case RELU: return x != x ? x : x > 0.0f ? x : 0.0f;
        case RELU2: return x != x ? x : x > 0.0f ? x * x : 0.0f;
        default: return x;
    }
}

typedef struct {
    float *gate, *up;
    int64_t rows;
    int32_t kind;
} Gating;

static void gate_token(void *context, int64_t token) {
    const Gating *job = context;
    float *gate = job->gate + token * job->rows, *up = job->up ? job->up + token * job->rows : NULL;
    for (int64_t i = 0; i < job->rows; i++) gate[i] = activate(job->kind, gate[i]) * (up ? up[i] : 1.0f);
}

/* out += down(act(gate x) * up x) for few tokens; `scratch` holds 2 * tokens * rows floats. `up` may be NULL. */
EXPORT void tc_ffn(const Matrix *gate, const Matrix *up, const Matrix *down, int32_t kind, int32_t tokens, int32_t few,
                   void *prepared, float *scratch, float *out, int64_t stride, const Team *team) {
    if (!gate->rows || !tokens) return;
    const int64_t size = tokens * gate->rows;
    memset(scratch, 0, sizeof(float) * 2 * (size_t)size);
    tc_product(gate, tokens, few, prepared, scratch, gate->rows, team);
    if (up) tc_product(up, tokens, few, prepared, scratch + size, gate->rows, team);
    Gating gating = {scratch, up ? scratch + size : NULL, gate->rows, kind};
    share(team, gate_token, &gating, tokens);
    const Input hidden = {scratch, gate->rows, 0, tokens};
    tc_product_down(down, &hidden, few, out, stride, team);
}

typedef struct {
    const uint8_t *from;
    uint8_t *to;
    int64_t stride, width, rows;
    const int64_t *index;
} Copy;

#define COPY_ROWS 64

static void copy_rows(void *context, int64_t item) {
    const Copy *job = context;
    const int64_t first = item * COPY_ROWS, last = first + COPY_ROWS < job->rows ? first + COPY_ROWS : job->rows;
    for (int64_t i = first; i < last; i++) {
        if (i + 4 < job->rows) __builtin_prefetch(job->from + job->index[i + 4] * job->stride);
        memcpy(job->to + i * job->width, job->from + job->index[i] * job->stride, (size_t)job->width);
    }
}

/* Copy rows `index` of a byte matrix, side by side. */
EXPORT void tc_gather(const uint8_t *from, int64_t stride, int64_t width, const int64_t *index, int64_t rows,
                      uint8_t *to, const Team *team) {
    Copy job = {from, to, stride, width, rows, index};
    share(team, copy_rows, &job, (rows + COPY_ROWS - 1) / COPY_ROWS);
}
