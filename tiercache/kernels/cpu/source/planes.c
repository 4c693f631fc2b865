/* Entry points: cut a product into items, give them to the team, run the path that this file was compiled for. */
#define _GNU_SOURCE

#ifdef __GNUC__
#define EXPORT __attribute__((visibility("default")))
#else
#define EXPORT
#endif

#include "generic.h"
#include "pool.h"
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FAST 1
#include "avx512_down.h"
#else
#define FAST 0
#endif
#include "vectors.h"

#define SMALL (1 << 19) /* weights times tokens below which waking a thread takes as long as the work */
#define FEW_ROWS 64 /* rows of one item when there are few tokens */
#define GATED 512   /* neurons of one item */

/* Up to how many tokens a matrix is walked once for each, from the cache; `few` of the other functions. */
EXPORT int32_t tc_few(void) { return FEW; }

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
    int64_t strips; /* or spans: pieces of a row */
    float *slices;  /* [slices][tokens][columns] of `down_few` */
    int32_t threads;
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
        const int64_t skip = FEW_ROWS * (job->threads - 1);
        BY_SHAPE(few_rows(m, PLANES, GROUP, &job->x, s, first, last, skip, job->out, job->stride))
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
    const int64_t first = item % blocks * 32, skip = 32 * (job->threads - 1);
    BY_SHAPE(many_rows(m, PLANES, GROUP, &job->x, s, first, skip, token, tokens, job->out, job->stride))
}
#endif

static Job job_of(const Matrix *m, int32_t tokens, int32_t few, void *prepared, float *out, int64_t stride) {
    const Shape s = shape_of(m->columns, m->group);
    Job job = {m, prepared_at(prepared, tokens, few, &s), NULL, s, out, stride, 0, NULL, 1};
    return job;
}

/* The team for so many multiplications: small ones are done at once, and wait for no core that others hold. */
static Team team_for(const Team *team, int64_t rows, int64_t columns, int64_t tokens) {
    Team some = *team;
    if (rows * columns * tokens < SMALL) some.threads = 1;
    return some;
}

static void run_product(Job *job, const Team *all) {
    const Team some = team_for(all, job->matrix->rows, job->matrix->columns, job->x.tokens), *team = &some;
    job->threads = team->threads;
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
    const int64_t slice = item / job->strips, then = (slice + job->threads) * SLICE;
    const int32_t begin = (int32_t)(item % job->strips) * REACH;
    const int32_t end = s->chunks - begin < REACH ? s->chunks : begin + REACH;
    float *to = job->slices + slice * job->input->tokens * m->columns;
    BY_SHAPE(few_down(m, PLANES, GROUP, job->input, s, slice * SLICE, then, begin, end, to))
}

static void add_slices(void *context, int64_t item) {
    const Job *job = context;
    const int64_t columns = job->matrix->columns, size = job->input->tokens * columns, first = item * 1024;
    const int64_t last = first + 1024 < columns ? first + 1024 : columns;
    for (int32_t t = 0; t < job->input->tokens; t++) {
        float *out = job->out + t * job->stride;
        for (int64_t slice = 0; slice * SLICE < job->matrix->rows; slice++) {
            const float *from = job->slices + slice * size + t * columns;
            for (int64_t i = first; i < last; i++) out[i] += from[i];
        }
    }
}

static void down_many(void *context, int64_t item) {
    const Job *job = context;
    const Matrix *m = job->matrix;
    const Shape *s = &job->shape;
    const Strip strip = strip_at(s, (int32_t)(item % job->strips) * WIDE, s->chunks);
    const int64_t token = item / job->strips * SPAN, left = job->input->tokens - token;
    const int tokens = left < SPAN ? (int)left : SPAN;
    BY_SHAPE(many_down(m, PLANES, GROUP, job->input, s, strip, token, tokens, job->out, job->stride))
}

static void run_fast_down(Job *job, const Team *team) {
    const int64_t chunks = job->shape.chunks, tokens = job->input->tokens;
    job->threads = team->threads;
    if (tokens > FEW) {
        job->strips = (chunks + WIDE - 1) / WIDE;
        share(team, down_many, job, job->strips * ((tokens + SPAN - 1) / SPAN));
        return;
    }
    job->strips = (chunks + REACH - 1) / REACH;
    share(team, down_few, job, job->strips * ((job->matrix->rows + SLICE - 1) / SLICE));
    share(team, add_slices, job, (job->matrix->columns + 1023) / 1024);
}
#endif

/* Floats of scratch that `tc_product_down` wants. */
EXPORT int64_t tc_down_scratch(int64_t rows, int32_t columns, int32_t tokens) {
    return tokens > FEW ? 0 : (rows + SLICE - 1) / SLICE * tokens * columns;
}

/* out[t * stride + c] += sum over rows i of x[t][i] * matrix[i][c]. */
EXPORT void tc_product_down(const Matrix *m, const Input *x, float *scratch, float *out, int64_t stride,
                            const Team *team) {
    Job job = job_of(m, x->tokens, 0, NULL, out, stride);
    const Team some = team_for(team, m->rows, m->columns, x->tokens);
    job.input = x, job.slices = scratch, team = &some;
    if (!m->rows || !x->tokens) return;
#if FAST
    if (fast(&job.shape)) {
        run_fast_down(&job, team);
        return;
    }
#endif
    share(team, down_part, &job, job.shape.real_parts);
}

enum { SILU, GELU, GELU_TANH, RELU, RELU2, IDENTITY };

static float activate(int32_t kind, float x) {
    switch (kind) {
        case SILU: return x / (1.0f + exp16(all16(-x))[0]);
        case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case RELU: return x != x ? x : x > 0.0f ? x : 0.0f;
        case RELU2: return x != x ? x : x > 0.0f ? x * x : 0.0f;
        default: return x;
    }
}

typedef struct {
    float *hidden; /* [tokens][rows][parts]; its results lie at [tokens][rows] of `to` */
    float *to;
    int64_t rows;
    int32_t kind, parts;
} Gating;

/* to = activate(gate) * up of `count` neurons, which lie in turn (gate, up), or activate(x) of `count` numbers. */
static void gate(const float *from, int32_t kind, int32_t parts, int64_t count, float *to) {
    int64_t i = 0;
    for (; kind == SILU && i + 16 <= count; i += 16) {
        const Floats a = load16(from + parts * i), b = parts == 2 ? load16(from + 2 * i + 16) : a;
        const Floats x = parts == 2 ? EVEN(a, b) : a;
        const Floats y = x / (all16(1.0f) + exp16(-x));
        store16(to + i, parts == 2 ? y * ODD(a, b) : y);
    }
    for (; i < count; i++)
        to[i] = parts == 2 ? activate(kind, from[2 * i]) * from[2 * i + 1] : activate(kind, from[i]);
}

static void gate_some(void *context, int64_t item) {
    const Gating *job = context;
    const int64_t cuts = (job->rows + GATED - 1) / GATED, token = item / cuts, first = item % cuts * GATED;
    const int64_t count = job->rows - first < GATED ? job->rows - first : GATED;
    const float *from = job->hidden + (token * job->rows + first) * job->parts;
    gate(from, job->kind, job->parts, count, job->to + token * job->rows + first);
}

static void run_gating(Gating *gating, int64_t tokens, const Team *team) {
    const Team some = team_for(team, gating->rows, 8, tokens); /* an activation takes as long as some products */
    share(&some, gate_some, gating, tokens * ((gating->rows + GATED - 1) / GATED));
}

/* Floats of scratch that `tc_ffn` wants. */
EXPORT int64_t tc_ffn_scratch(int64_t rows, int32_t columns, int32_t tokens) {
    return 3 * tokens * rows + tc_down_scratch(rows, columns, tokens);
}

/* out += down(act(gate x) * up x); the rows of `inward` are gate and up by turns, or one matrix alone. */
EXPORT void tc_ffn(const Matrix *inward, const Matrix *down, int32_t kind, int32_t tokens, int32_t few, void *prepared,
                   float *scratch, float *out, int64_t stride, const Team *team) {
    const int64_t rows = down->rows;
    if (!rows || !tokens) return;
    float *hidden = scratch + tokens * rows;
    memset(hidden, 0, sizeof(float) * (size_t)(tokens * inward->rows));
    tc_product(inward, tokens, few, prepared, hidden, inward->rows, team);
    Gating gating = {hidden, scratch, rows, kind, inward->parts};
    run_gating(&gating, tokens, team);
    const Input input = {scratch, rows, 0, tokens};
    tc_product_down(down, &input, scratch + 3 * tokens * rows, out, stride, team);
}

typedef struct {
    const Input *x;
    const float *before, *after; /* [columns], or NULL for ones */
    float *out;                  /* [tokens][columns] */
    int32_t columns;
} Transform;

enum { TURN = 64 };

static void transform_token(void *context, int64_t token) {
    const Transform *job = context;
    float *out = job->out + token * job->columns;
    load_row(job->x, token, 0, job->columns, out);
    if (job->before)
        for (int32_t i = 0; i < job->columns; i++) out[i] *= job->before[i];
    for (int32_t first = 0; first + TURN <= job->columns; first += TURN) transform_block(out + first);
    if (job->after)
        for (int32_t i = 0; i < job->columns; i++) out[i] *= job->after[i];
}

/* out = the Hadamard transform of x times `before`, times `after`. */
EXPORT void tc_hadamard(const Input *x, int32_t columns, const float *before, const float *after, float *out,
                        const Team *team) {
    Transform job = {x, before, after, out, columns};
    Team alone = *team;
    if ((int64_t)x->tokens * columns < 1 << 15) alone.threads = 1; /* waking a thread takes as long */
    share(&alone, transform_token, &job, x->tokens);
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

#include "layer.h"
#include "reader.h"
