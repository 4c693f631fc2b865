/* The halves of a Llama-like layer, as tiercache/kernels/blocks.py tells them. Included by planes.c.
 *
 * A token's results do not depend on the tokens beside it: each head adds up the slots that the token attends to in
 * their order, as if the others were not there, in slices of 256. So a path of a tree has the bits of the same tokens
 * in a row.
 */
#include "attention.h"

typedef struct {
    Matrix inward[3];
    const void *norm, *bias[3], *head_norm[2]; /* of the kind of x; NULL where there is none */
    const float *factors, *outward_factors;    /* NULL for ones */
    Matrix outward;
    const void *outward_bias;
    float eps, scaling;
    int32_t kind, heads, key_heads, head_dim; /* kind of x, norms, biases, cos, sin, keys and values */
} AttentionHalf;

typedef struct {
    Matrix inward; /* gate and up by turns */
    const void *norm;
    const float *factors, *down_factors;
    Matrix down;
    float eps;
    int32_t kind, activation;
} FeedForwardHalf;

/* x / rms(x) * weight, of one row in place. */
static void norm_row(float *x, int64_t columns, const void *weight, int32_t kind, float eps) {
    Floats squares = all16(0.0f);
    for (int64_t i = 0; i < columns; i += 16) {
        const Floats v = read16(x, 0, i, columns - i);
        squares += v * v;
    }
    const Floats scale = all16(1.0f / sqrtf(sum_of(squares) / (float)columns + eps));
    for (int64_t i = 0; i < columns; i += 16) {
        const Floats v = read16(x, 0, i, columns - i) * scale * read16(weight, kind, i, columns - i);
        memcpy(x + i, &v, columns - i < 16 ? 4 * (size_t)(columns - i) : sizeof v);
    }
}

/* A row as the rows of a matrix want it: times the factors of its inputs, transformed. */
static void turn_row(float *x, int64_t columns, const float *factors) {
    if (factors)
        for (int64_t i = 0; i < columns; i++) x[i] *= factors[i];
    for (int64_t first = 0; first + 64 <= columns; first += 64) transform_block(x + first);
}

/* Scratch for inputs [tokens][columns] and what they are quantised to, which begins at a multiple of 64 bytes. */
static int64_t input_bytes(const Matrix *m, int32_t tokens) {
    return 64 + ((int64_t)tokens * m->columns * 4 + 63) / 64 * 64 + tc_prepared_bytes(tokens, m->columns, m->group);
}

typedef struct {
    const Input *x; /* NULL: the rows are there */
    const void *norm;
    const float *factors;
    float *rows;
    int64_t columns;
    int32_t kind;
    float eps;
    Preparation to;
} Normed;

static void norm_token(void *context, int64_t token) {
    Normed *job = context;
    float *row = job->rows + token * job->columns;
    if (job->x) load_row(job->x, token, 0, job->columns, row);
    if (job->norm) norm_row(row, job->columns, job->norm, job->kind, job->eps);
    turn_row(row, job->columns, job->factors);
    prepare_token(&job->to, token);
}

static Team team_for_rows(const Team *team, int64_t tokens, int64_t columns) {
    Team some = *team;
    if (tokens * columns < 1 << 15) some.threads = 1; /* waking a thread takes as long */
    return some;
}

/* Norm (if any), transform and quantise inputs of matrices like `m`; where the quantised ones lie. */
static void *quantised(Normed *job, const Matrix *m, int32_t tokens, void *scratch, const Team *team) {
    const Shape s = shape_of(m->columns, m->group);
    uint8_t *memory = (uint8_t *)(((uintptr_t)scratch + 63) / 64 * 64);
    if (!job->rows) {
        job->rows = (float *)memory;
        memory += ((int64_t)tokens * m->columns * 4 + 63) / 64 * 64;
    }
    const Input rows = {job->rows, m->columns, 0, tokens};
    job->columns = m->columns;
    job->to = (Preparation){&rows, prepared_at(memory, tokens, tokens <= FEW, &s), s, m->columns};
    const Team some = team_for_rows(team, tokens, m->columns);
    share(&some, norm_token, job, tokens);
    return memory;
}

typedef struct {
    Job job[3];
    int64_t end[3]; /* of each one's items */
    void (*work)(void *, int64_t);
} Several;

static void run_several(void *context, int64_t item) {
    Several *all = context;
    int which = 0;
    while (item >= all->end[which]) which++;
    all->work(&all->job[which], which ? item - all->end[which - 1] : item);
}

/* Products of the same inputs with three matrices, in one queue. */
static void three_products(const Matrix m[3], int32_t tokens, void *prepared, float *const out[3], const Team *team) {
    Several all;
    const int32_t few = tokens <= FEW;
    int64_t rows = 0, items = 0;
    for (int i = 0; i < 3; i++) rows += m[i].rows;
    const Team some = team_for(team, rows, m->columns, tokens);
    all.work = product_few;
    for (int i = 0; i < 3; i++) {
        all.job[i] = job_of(&m[i], tokens, few, prepared, out[i], m[i].rows);
        all.job[i].threads = some.threads;
        int64_t here = (m[i].rows + FEW_ROWS - 1) / FEW_ROWS;
#if FAST
        if (fast(&all.job[i].shape) && !few) {
            all.work = product_many;
            here = (m[i].rows + 31) / 32 * ((tokens + STRIP - 1) / STRIP);
        }
#endif
        all.end[i] = items += here;
    }
    share(&some, run_several, &all, items);
}

typedef struct {
    const AttentionHalf *w;
    const void *cos, *sin;
    float *made[3]; /* queries, keys, values: [tokens][rows] */
    void *to[2];    /* keys and values of the first token */
    int64_t strides[2][2]; /* of those, elements from head to head and from token to token */
} Heads;

/* Bias, norm and position of a token's heads; keys and values to where they belong. */
static void finish_token(void *context, int64_t token) {
    const Heads *job = context;
    const AttentionHalf *w = job->w;
    const int64_t dim = w->head_dim;
    for (int part = 0; part < 3; part++) {
        const int64_t heads = part ? w->key_heads : w->heads;
        float *row = job->made[part] + token * heads * dim;
        for (int64_t i = 0; w->bias[part] && i < heads * dim; i += 16) {
            const Floats v = read16(row, 0, i, heads * dim - i) + read16(w->bias[part], w->kind, i, heads * dim - i);
            memcpy(row + i, &v, heads * dim - i < 16 ? 4 * (size_t)(heads * dim - i) : sizeof v);
        }
        for (int64_t head = 0; head < heads; head++) {
            float *x = row + head * dim;
            if (part < 2 && w->head_norm[part]) norm_row(x, dim, w->head_norm[part], w->kind, w->eps);
            if (part < 2) rotate(x, dim, job->cos, job->sin, w->kind, token * dim);
            if (!part) continue;
            const int64_t *stride = job->strides[part - 1];
            write_numbers(job->to[part - 1], w->kind, head * stride[0] + token * stride[1], x, dim);
        }
    }
}

/* Bytes of scratch that `tc_project` wants. */
EXPORT int64_t tc_project_scratch(const AttentionHalf *w, int32_t tokens) {
    return input_bytes(w->inward, tokens) + 8 * (int64_t)tokens * w->key_heads * w->head_dim;
}

/* Queries [tokens][heads][head_dim] of x, keys and values to where `heads` says. */
static void project(const AttentionHalf *w, const Input *x, Heads *heads, void *scratch, const Team *team) {
    const int64_t width = (int64_t)w->key_heads * w->head_dim, tokens = x->tokens;
    float *const own = scratch;
    heads->w = w, heads->made[1] = own, heads->made[2] = own + tokens * width;
    memset(heads->made[0], 0, 4 * (size_t)(tokens * w->heads * w->head_dim));
    memset(own, 0, 8 * (size_t)(tokens * width));
    Normed job = {.x = x, .norm = w->norm, .factors = w->factors, .kind = w->kind, .eps = w->eps};
    void *prepared = quantised(&job, w->inward, x->tokens, own + 2 * tokens * width, team);
    three_products(w->inward, x->tokens, prepared, heads->made, team);
    const Team some = team_for_rows(team, tokens, w->heads * w->head_dim);
    share(&some, finish_token, heads, tokens);
}

/* Queries [tokens][heads][head_dim], keys and values [key_heads][tokens][head_dim] of x. */
EXPORT void tc_project(const AttentionHalf *w, const Input *x, const void *cos, const void *sin, void *scratch,
                       float *queries, void *keys, void *values, const Team *team) {
    const int64_t dim = w->head_dim, apart = x->tokens * dim;
    Heads heads = {w, cos, sin, {queries}, {keys, values}, {{apart, dim}, {apart, dim}}};
    project(w, x, &heads, scratch, team);
}

typedef struct {
    const Input *x;
    const float *made, *factors; /* factors behind a transform; NULL for neither */
    const void *bias;
    void *out;
    int64_t columns;
    int32_t kind;
} Residual;

/* out = x + (made, transformed, times factors, plus bias), rounded. */
static void add_token(void *context, int64_t token) {
    const Residual *job = context;
    float *row = (float *)job->made + token * job->columns;
    if (job->factors) {
        turn_row(row, job->columns, NULL);
        for (int64_t i = 0; i < job->columns; i++) row[i] *= job->factors[i];
    }
    for (int64_t i = 0; i < job->columns; i += 16) {
        const int64_t left = job->columns - i;
        Floats v = read16(row, 0, i, left);
        if (job->bias) v += read16(job->bias, job->kind, i, left);
        v += read16(job->x->data, job->x->kind, token * job->x->stride + i, left);
        memcpy(row + i, &v, left < 16 ? 4 * (size_t)left : sizeof v);
    }
    write_numbers(job->out, job->kind, token * job->columns, row, job->columns);
}

/* Bytes of scratch that `tc_attend` wants. */
EXPORT int64_t tc_attend_scratch(const AttentionHalf *w, int32_t tokens, int64_t slots) {
    const int64_t heads = (int64_t)w->heads * w->head_dim;
    return input_bytes(&w->outward, tokens) + 4 * (int64_t)tokens * (heads + w->outward.rows) +
           attention_bytes(w->heads, w->head_dim, tokens, slots);
}

/* out = x + outward(attention of queries). */
EXPORT void tc_attend(const AttentionHalf *w, const Input *x, const float *queries, const Slots *slots, void *scratch,
                      void *out, const Team *team) {
    const int64_t tokens = x->tokens, width = (int64_t)w->heads * w->head_dim;
    float *found = scratch, *made = found + tokens * width;
    uint8_t *rest = (uint8_t *)(made + tokens * w->outward.rows);
    Attending job = {.slots = slots, .queries = queries, .out = found, .tokens = tokens};
    job.heads = w->heads, job.key_heads = w->key_heads, job.dim = w->head_dim, job.scaling = w->scaling;
    rest = attend(&job, rest, team);
    Normed inputs = {.rows = found, .factors = w->outward_factors};
    void *prepared = quantised(&inputs, &w->outward, x->tokens, rest, team);
    memset(made, 0, 4 * (size_t)(tokens * w->outward.rows));
    tc_product(&w->outward, x->tokens, tokens <= FEW, prepared, made, w->outward.rows, team);
    Residual residual = {x, made, NULL, w->outward_bias, out, w->outward.rows, w->kind};
    const Team some = team_for_rows(team, tokens, w->outward.rows);
    share(&some, add_token, &residual, tokens);
}

/* Bytes of scratch that `tc_step` wants. */
EXPORT int64_t tc_step_scratch(const AttentionHalf *w, int32_t tokens, int64_t slots) {
    const int64_t first = tc_project_scratch(w, tokens), second = tc_attend_scratch(w, tokens, slots);
    return 4 * (int64_t)tokens * w->heads * w->head_dim + (first > second ? first : second);
}

/* `tc_project` into the last slots, then `tc_attend`. */
EXPORT void tc_step(const AttentionHalf *w, const Input *x, const void *cos, const void *sin, const Slots *slots,
                    void *scratch, void *out, const Team *team) {
    const int64_t behind = slots->slots - x->tokens, size = w->kind ? 2 : 4;
    float *queries = scratch;
    uint8_t *rest = (uint8_t *)(queries + (int64_t)x->tokens * w->heads * w->head_dim);
    Heads heads = {w, cos, sin, {queries}, {(uint8_t *)slots->keys + behind * slots->key_strides[1] * size,
                   (uint8_t *)slots->values + behind * slots->value_strides[1] * size},
                   {{0}}};
    memcpy(heads.strides[0], slots->key_strides, sizeof heads.strides[0]);
    memcpy(heads.strides[1], slots->value_strides, sizeof heads.strides[1]);
    project(w, x, &heads, rest, team);
    tc_attend(w, x, queries, slots, rest, out, team);
}

/* Bytes of scratch that `tc_feed_forward` wants. */
EXPORT int64_t tc_feed_forward_scratch(const FeedForwardHalf *w, int32_t tokens) {
    const int64_t neurons = w->down.rows, columns = w->down.columns;
    return input_bytes(&w->inward, tokens) +
           4 * (tokens * (3 * neurons + columns) + tc_down_scratch(neurons, w->down.columns, tokens));
}

/* out = x + down(act(gate) * up). */
EXPORT void tc_feed_forward(const FeedForwardHalf *w, const Input *x, void *scratch, void *out, const Team *team) {
    const int64_t tokens = x->tokens, columns = w->down.columns, neurons = w->down.rows;
    float *made = scratch, *own = made + tokens * columns;
    float *rest = own + 3 * tokens * neurons + tc_down_scratch(neurons, w->down.columns, x->tokens);
    Normed job = {.x = x, .norm = w->norm, .factors = w->factors, .kind = w->kind, .eps = w->eps};
    void *prepared = quantised(&job, &w->inward, x->tokens, rest, team);
    memset(made, 0, 4 * (size_t)(tokens * columns));
    tc_ffn(&w->inward, &w->down, w->activation, x->tokens, tokens <= FEW, prepared, own, made, columns, team);
    Residual residual = {x, made, w->down_factors, NULL, out, columns, w->kind};
    const Team some = team_for_rows(team, tokens, columns);
    share(&some, add_token, &residual, tokens);
}

typedef struct {
    const float *made;
    void *out;
    int64_t count;
    int32_t kind;
} Rounding;

#define ROUNDED 4096 /* numbers of one item */

static void round_some(void *context, int64_t item) {
    const Rounding *job = context;
    const int64_t first = item * ROUNDED, left = job->count - first;
    write_numbers(job->out, job->kind, first, job->made + first, left < ROUNDED ? left : ROUNDED);
}

/* Bytes of scratch that `tc_linear` wants. */
EXPORT int64_t tc_linear_scratch(const Matrix *m, int32_t tokens) {
    return input_bytes(m, tokens) + 4 * (int64_t)tokens * m->rows;
}

/* out [tokens][rows] = the matrix times the transform of x times factors, rounded to the kind of x. */
EXPORT void tc_linear(const Matrix *m, const Input *x, const float *factors, void *scratch, void *out,
                      const Team *team) {
    float *made = scratch;
    const int64_t count = (int64_t)x->tokens * m->rows;
    Normed job = {.x = x, .factors = factors};
    void *prepared = quantised(&job, m, x->tokens, made + count, team);
    memset(made, 0, 4 * (size_t)count);
    tc_product(m, x->tokens, x->tokens <= FEW, prepared, made, m->rows, team);
    Rounding rounding = {made, out, count, x->kind};
    const Team some = team_for_rows(team, 1, count);
    share(&some, round_some, &rounding, (count + ROUNDED - 1) / ROUNDED);
}
