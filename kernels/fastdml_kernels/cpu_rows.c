/* The mutual loss on the CPU: losses, statistics and gradients in one call.

Target "peers" without edge weights or gates; temperature, label smoothing and ignored rows
included. A row is read for its maximum, for its normaliser and for everything else, all but the
first time from cache, and its gradient is written once; O(K C) work, O(K^2 C) with statistics.
Anything out of the ordinary (a logit or a loss that is not finite, a label that is no class, no
labelled row) ends the call with status 1, and the caller computes the loss in torch instead.

Sums: fp32 over at most FLUSH vectors in each lane, double beyond, blocks of rows in a fixed order,
so that results do not depend on the number of threads. Differences between peers come before any
sum, and identical peers diverge by exactly 0.

Vectors are GCC's and Clang's generic ones; on x86-64 Linux the loops are compiled for AVX2 and for
the baseline, and the processor chooses. Python's ctypes calls `fastdml_rows`. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    LANES = 8,
    PEERS = 16,      /* at most */
    FLUSH = 64,      /* vectors added up in fp32 before their sum goes to double */
    BLOCK = 32,      /* rows whose sums are kept together */
    THREADS = 64,    /* at most */
    WORTH = 1 << 18, /* logits for each thread that is started */
};
enum { FLOAT32, BFLOAT16 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

/* Where each of the packed statistics begins: the numbers of StatsLayout in stats_layout.py. */
typedef struct {
    int64_t ce, kl, label_weight, labelled, entropy, correct, ensemble_correct, pairwise_kl;
} StatsLayout;

typedef struct {
    int64_t K, N, C, label_bytes, ignore_index, averaged, threads;
    const char *labels;
    float *losses, *stats; /* (K,); packed statistics, NULL where not wanted */
    const StatsLayout *at;
    const char *logits[PEERS];
    char *grads[PEERS];                              /* NULL where not wanted */
    int64_t row_bytes[PEERS], grad_row_bytes[PEERS]; /* from one row to the next */
    int types[PEERS];                                /* of logits and gradients */
    double temperature, smoothing, ce_weight, kl_weight;
    float ce_factor, kl_factor; /* of the gradients */
} Problem;

/* Sums over a block of rows. */
typedef struct {
    double energy; /* of q_l d_l over all l, where d_l = log q_l - max over the peers of log q */
    double ce[PEERS], pull[PEERS], entropy[PEERS], correct[PEERS], together;
    double cross[PEERS][PEERS]; /* q_l d_k */
} Sums;

/* The sums that are accumulated as vectors; `flush` adds their lanes to the `Sums`. */
typedef struct {
    vec energy, pull[PEERS], entropy[PEERS], towards_all[PEERS], cross[PEERS][PEERS];
    int vectors;
} Lanes;

/* One sample: a row of every peer, its maximum (top) and normalisers relative to that. */
typedef struct {
    const char *z[PEERS];
    char *g[PEERS];
    int64_t y;
    float top[PEERS], log_sum[PEERS], log_sum_t[PEERS], scale[PEERS]; /* exp(-log_sum) */
} Row;

INLINE vec all(float x) { return x - (vec){0}; }

INLINE vec maximum(vec a, vec b) {
    const ints above = a > b;
    return (vec)(((ints)a & above) | ((ints)b & ~above));
}

INLINE double total(vec x) {
    return ((double)x[0] + x[1] + ((double)x[2] + x[3])) +
           ((double)x[4] + x[5] + ((double)x[6] + x[7]));
}

/* exp(x) for x <= 0 within about one unit in the last place; 0 from -87 down. Range reduction and
   polynomial are those of Cephes' expf (Moshier). */
INLINE vec exp_(vec x) {
    const ints above = x > -87.0f;
    x = (vec)((ints)x & above);
    const vec shift = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    vec whole = x * 1.44269504f + shift;
    const ints power = (ints)whole - (ints)shift;
    whole -= shift;
    const vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    p *= (vec)((power + 127) << 23);
    return (vec)((ints)p & above);
}

INLINE vec load(const char *row, int type, int64_t at) {
    vec x;
    if (type == FLOAT32) {
        memcpy(&x, row + 4 * at, sizeof x);
    } else {
        halves h;
        memcpy(&h, row + 2 * at, sizeof h);
        x = (vec)(__builtin_convertvector(h, words) << 16);
    }
    return x;
}

INLINE float load_one(const char *row, int type, int64_t at) {
    float x;
    if (type == FLOAT32) {
        memcpy(&x, row + 4 * at, 4);
    } else {
        uint16_t h;
        memcpy(&h, row + 2 * at, 2);
        const uint32_t bits = (uint32_t)h << 16;
        memcpy(&x, &bits, 4);
    }
    return x;
}

INLINE void store(char *row, int type, int64_t at, vec x) {
    if (type == FLOAT32) {
        memcpy(row + 4 * at, &x, sizeof x);
    } else { /* to nearest, ties to even; x is finite */
        words bits = (words)x;
        bits += 0x7fff + ((bits >> 16) & 1);
        const halves h = __builtin_convertvector(bits >> 16, halves);
        memcpy(row + 2 * at, &h, sizeof h);
    }
}

INLINE int size_of(int type) { return type == FLOAT32 ? 4 : 2; }

/* A row is read in whole vectors. Where C is no multiple of LANES, the last vector overlaps the
   previous one; `fresh` masks lanes already counted, so that no sum has them twice, and a gradient
   that is stored twice has the same value. Rows of fewer than LANES values are padded copies. */
INLINE int64_t whole_vectors(int64_t C) { return C - C % LANES; }
INLINE int64_t last_vector(int64_t C) { return C < LANES ? 0 : C - LANES; }

INLINE vec fresh(vec x, int64_t C) {
    ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    const ints mask = C < LANES ? lane < (int)C : lane >= (int)(LANES - C % LANES);
    return (vec)((ints)x & mask);
}

INLINE int64_t label(const Problem *p, int64_t row) {
    return p->label_bytes == 8 ? ((const int64_t *)p->labels)[row]
                               : ((const int32_t *)p->labels)[row];
}

INLINE void flush(Lanes *lanes, Sums *sums, int K, double spread, int stats) {
    sums->energy += total(lanes->energy);
    lanes->energy = all(0);
    for (int k = 0; k < K; k++) {
        sums->pull[k] += total(lanes->pull[k]);
        sums->ce[k] -= spread * total(lanes->towards_all[k]);
        lanes->pull[k] = lanes->towards_all[k] = all(0);
        if (!stats) continue;
        sums->entropy[k] += total(lanes->entropy[k]);
        lanes->entropy[k] = all(0);
        for (int l = 0; l < K; l++) {
            sums->cross[l][k] += total(lanes->cross[l][k]);
            lanes->cross[l][k] = all(0);
        }
    }
    lanes->vectors = 0;
}

/* The largest logit; NAN where one is not finite. */
INLINE float highest(const char *z, int type, int64_t C) {
    vec high = load(z, type, last_vector(C)), trouble = high * 0.0f;
    for (int64_t c = 0; c < whole_vectors(C); c += LANES) {
        const vec x = load(z, type, c);
        high = maximum(x, high);
        trouble += x * 0.0f; /* NaN, once x is not finite */
    }
    float top = high[0];
    for (int i = 1; i < LANES; i++) top = high[i] > top ? high[i] : top;
    return top + (float)total(trouble);
}

/* The sum of exp((z - top) / T). `kept`, unless NULL, gets the whole vectors' exponentials. */
INLINE double normaliser(const char *z, int type, int64_t C, float top, float inverse_t,
                         char *kept) {
    double sum = 0;
    vec part = all(0);
    for (int64_t c = 0; c < whole_vectors(C); c += LANES) {
        const vec e = exp_((load(z, type, c) - top) * inverse_t);
        if (kept) store(kept, FLOAT32, c, e);
        part += e;
        if (c / LANES % FLUSH == FLUSH - 1) {
            sum += total(part);
            part = all(0);
        }
    }
    if (C % LANES)
        part += fresh(exp_((load(z, type, last_vector(C)) - top) * inverse_t), C);
    return sum + total(part);
}

/* The terms of LANES classes from c on; `part` marks the last vector, which overlaps the previous.
   narrow: logits may be bfloat16. All of this is inlined, so that a flag that is off costs nothing
   where `blocks` gives it as a constant. */
INLINE void terms(const Problem *p, const Row *row, Lanes *lanes, float *mean, int64_t c, int part,
                  int K, int narrow, int tempered, int stats, int grads) {
    const int kept = grads && !narrow;
    const float inverse_t = (float)(1 / p->temperature);
    const float spread = (float)(p->smoothing / (double)p->C);
    vec prob[PEERS], q[PEERS], gap[PEERS], top = all(-INFINITY), sum = all(0), together = all(0);
    for (int k = 0; k < K; k++) {
        const vec x = load(row->z[k], narrow ? p->types[k] : FLOAT32, c) - row->top[k];
        const vec log_p = x - row->log_sum[k];
        /* `normaliser` left exp(x) in the gradient's memory. In the overlapping vector gradients
           have replaced some: exp(x) again, bit for bit, as classes of equal logits must tie. */
        prob[k] = kept ? (part ? exp_(x) : load(row->g[k], FLOAT32, c)) * row->scale[k] : exp_(log_p);
        if (spread != 0) lanes->towards_all[k] += part ? fresh(log_p, p->C) : log_p;
        if (stats) {
            const vec uncertain = prob[k] * log_p;
            lanes->entropy[k] -= part ? fresh(uncertain, p->C) : uncertain;
            together += prob[k];
        }
        gap[k] = tempered ? x * inverse_t - row->log_sum_t[k] : log_p;
        q[k] = tempered ? exp_(gap[k]) : prob[k];
        top = maximum(gap[k], top);
        sum += q[k];
    }
    for (int k = 0; k < K; k++) {
        gap[k] -= top;
        if (part) gap[k] = fresh(gap[k], p->C);
        lanes->energy += q[k] * gap[k];
        lanes->pull[k] += sum * gap[k];
    }
    if (stats) {
        for (int l = 0; l < K; l++)
            for (int k = 0; k < K; k++) lanes->cross[l][k] += q[l] * gap[k];
        memcpy(mean + c, &together, sizeof together);
    }
    if (grads) {
        const float pair = K > 1 ? p->kl_factor / (float)(K - 1) : 0;
        const int64_t hit = row->y - c;
        vec apart = all(0);
        for (int k = 1; k < K; k++) apart += q[k] - q[0];
        for (int k = 0; k < K; k++) {
            const vec away = (q[k] - q[0]) * (float)K - apart;
            vec grad = p->ce_factor * (prob[k] - spread) + pair * away;
            if (0 <= hit && hit < LANES) grad[hit] -= p->ce_factor * (float)(1 - p->smoothing);
            store(row->g[k], narrow ? p->types[k] : FLOAT32, c, grad);
        }
    }
    lanes->vectors++;
}

/* The rows of a block; 0 where one holds a logit that is not finite. */
INLINE int block(const Problem *p, int64_t begin, int64_t end, Sums *sums, float *mean, int narrow,
                 int tempered, int stats, int grads) {
    const int K = (int)p->K;
    const int64_t C = p->C;
    const double spread = p->smoothing / (double)C;
    char padded[2][PEERS][4 * LANES];
    Lanes lanes;
    memset(&lanes, 0, sizeof lanes);
    for (int64_t n = begin; n < end; n++) {
        Row row;
        row.y = label(p, n);
        if (row.y == p->ignore_index) {
            for (int k = 0; k < K && grads; k++)
                memset(p->grads[k] + n * p->grad_row_bytes[k], 0, C * size_of(p->types[k]));
            continue;
        }
        for (int k = 0; k < K; k++) {
            const int type = narrow ? p->types[k] : FLOAT32;
            row.z[k] = p->logits[k] + n * p->row_bytes[k];
            if (grads) row.g[k] = p->grads[k] + n * p->grad_row_bytes[k];
            if (C < LANES) {
                for (int i = 0; i < LANES; i++)
                    memcpy(padded[0][k] + i * size_of(type),
                           row.z[k] + (i < C ? i : 0) * size_of(type), size_of(type));
                row.z[k] = padded[0][k];
                row.g[k] = padded[1][k];
            }
            const float top = row.top[k] = highest(row.z[k], type, C);
            if (isnan(top)) return 0;
            char *kept = grads && !narrow ? row.g[k] : NULL;
            const double sum = normaliser(row.z[k], type, C, top, 1, kept);
            row.log_sum[k] = (float)log(sum);
            row.scale[k] = (float)(1 / sum);
            if (tempered)
                row.log_sum_t[k] = (float)log(
                    normaliser(row.z[k], type, C, top, (float)(1 / p->temperature), NULL));
            const float at_y = load_one(row.z[k], type, row.y);
            sums->ce[k] += (1 - p->smoothing) * ((double)row.log_sum[k] - ((double)at_y - top));
            if (stats && at_y == top) { /* ties go to the first class */
                int64_t c = 0;
                while (c < row.y && load_one(row.z[k], type, c) != top) c++;
                sums->correct[k] += c == row.y;
            }
        }
        for (int64_t c = 0; c < whole_vectors(C); c += LANES) {
            terms(p, &row, &lanes, mean, c, 0, K, narrow, tempered, stats, grads);
            if (lanes.vectors == FLUSH) flush(&lanes, sums, K, spread, stats);
        }
        if (C % LANES) {
            terms(p, &row, &lanes, mean, last_vector(C), 1, K, narrow, tempered, stats, grads);
            if (lanes.vectors == FLUSH) flush(&lanes, sums, K, spread, stats);
        }
        for (int k = 0; k < K && grads && C < LANES; k++)
            memcpy(p->grads[k] + n * p->grad_row_bytes[k], row.g[k], C * size_of(p->types[k]));
        if (stats) {
            const float at_y = mean[row.y];
            int64_t c = 0;
            while (c < C && (c < row.y ? mean[c] < at_y : mean[c] <= at_y)) c++;
            sums->together += c == C;
        }
    }
    flush(&lanes, sums, K, spread, stats);
    return 1;
}

/* Blocks of rows `begin` to `end`. Each call of `block` is inlined with its own constants: one for
   each common case, float32 with gradients, with and without statistics, and one for the rest. */
FOR_EACH_PROCESSOR
static int blocks(const Problem *p, Sums *sums, int64_t begin, int64_t end, float *mean) {
    const int tempered = p->temperature != 1 && p->K > 1;
    const int grads = p->grads[0] != NULL, stats = p->stats != NULL;
    int narrow = 0;
    for (int k = 0; k < p->K; k++) narrow |= p->types[k] != FLOAT32;
    for (int64_t b = begin; b < end; b++) {
        Sums *own = sums + b;
        memset(own, 0, sizeof *own);
        const int64_t from = b * BLOCK, to = from + BLOCK < p->N ? from + BLOCK : p->N;
        int fine;
        if (narrow || tempered || !grads)
            fine = block(p, from, to, own, mean, 1, tempered, stats, grads);
        else if (stats)
            fine = block(p, from, to, own, mean, 0, 0, 1, 1);
        else
            fine = block(p, from, to, own, mean, 0, 0, 0, 1);
        if (!fine) return 0;
    }
    return 1;
}

typedef struct {
    const Problem *problem;
    Sums *sums;
    int64_t begin, end;
    float *mean;
    int fine, started;
    pthread_t thread;
} Share;

static void *work(void *argument) {
    Share *own = argument;
    own->fine = blocks(own->problem, own->sums, own->begin, own->end, own->mean);
    return NULL;
}

/* Losses and packed statistics from the sums of all rows; 0 where a loss is infinite, because
logits are so far apart that fp32 does not hold their difference. */
static int conclude(const Problem *p, const Sums *sums, int64_t blocks_, double labelled) {
    const int K = (int)p->K;
    const double *parts = (const double *)sums;
    const size_t size = sizeof(Sums) / sizeof(double);
    Sums t = sums[0];
    for (int64_t b = 1; b < blocks_; b++)
        for (size_t i = 0; i < size; i++) ((double *)&t)[i] += parts[b * size + i];
    const double scale = p->temperature * p->temperature;
    const double per_row = p->averaged ? 1 / labelled : 1;
    for (int k = 0; k < K; k++) {
        const double kl = K > 1 ? scale * (t.energy - t.pull[k]) / (K - 1) : 0;
        if (!isfinite(t.ce[k] + kl)) return 0;
        p->losses[k] = (float)(per_row * (p->ce_weight * t.ce[k] + p->kl_weight * kl));
        if (!p->stats) continue;
        p->stats[p->at->ce + k] = (float)(t.ce[k] / labelled);
        p->stats[p->at->kl + k] = (float)(kl / labelled);
        p->stats[p->at->entropy + k] = (float)(t.entropy[k] / labelled);
        p->stats[p->at->correct + k] = (float)t.correct[k];
        for (int l = 0; l < K; l++) /* teacher l, student k */
            p->stats[p->at->pairwise_kl + l * K + k] =
                (float)(scale * (t.cross[l][l] - t.cross[l][k]) / labelled);
    }
    if (p->stats) {
        p->stats[p->at->label_weight] = p->stats[p->at->labelled] = (float)labelled;
        p->stats[p->at->ensemble_correct] = (float)t.together;
    }
    return 1;
}

/* Returns 0: done; 1: a case that the caller must compute otherwise, outputs are undefined; 2: no
   memory.
   whole: K, N, C, bytes of a label, ignore_index, averaged, threads; addresses of the labels, the
   losses and the statistics; then for each peer the addresses of its logits and gradients, the
   bytes from one row to the next of both, and its type. real: as named. */
int fastdml_rows(const int64_t *whole, const double *real, const StatsLayout *at) {
    Problem problem = {
        .K = whole[0], .N = whole[1], .C = whole[2], .label_bytes = whole[3],
        .ignore_index = whole[4], .averaged = whole[5], .threads = whole[6],
        .labels = (const char *)whole[7], .losses = (float *)whole[8], .stats = (float *)whole[9],
        .at = at,
        .temperature = real[0], .smoothing = real[1], .ce_weight = real[2], .kl_weight = real[3],
    };
    Problem *p = &problem;
    for (int k = 0; k < p->K; k++) {
        const int64_t *own = whole + 10 + 5 * k;
        p->logits[k] = (const char *)own[0];
        p->grads[k] = (char *)own[1];
        p->row_bytes[k] = own[2];
        p->grad_row_bytes[k] = own[3];
        p->types[k] = (int)own[4];
    }
    int64_t labelled = 0;
    for (int64_t n = 0; n < p->N; n++) {
        const int64_t y = label(p, n);
        if (y == p->ignore_index) continue;
        if (y < 0 || y >= p->C) return 1;
        labelled++;
    }
    if (labelled == 0) return 1;
    const double per_row = p->averaged ? 1 / (double)labelled : 1;
    p->ce_factor = (float)(p->ce_weight * per_row);
    p->kl_factor = (float)(p->kl_weight * p->temperature * per_row);

    const int64_t count = (p->N + BLOCK - 1) / BLOCK;
    int64_t threads = p->K * p->N * p->C / WORTH;
    if (threads > p->threads) threads = p->threads;
    if (threads > count) threads = count;
    if (threads > THREADS) threads = THREADS;
    if (threads < 1) threads = 1;
    const int64_t mean_size = p->stats ? p->C + LANES : 1;
    Sums *sums = malloc(count * sizeof *sums);
    float *means = malloc(threads * mean_size * sizeof *means);
    if (!sums || !means) {
        free(sums);
        free(means);
        return 2;
    }
    Share shares[THREADS];
    for (int64_t t = threads - 1; t >= 0; t--) { /* the calling thread's is last */
        shares[t] = (Share){.problem = p, .sums = sums, .begin = count * t / threads,
                            .end = count * (t + 1) / threads, .mean = means + t * mean_size};
        shares[t].started = t && !pthread_create(&shares[t].thread, NULL, work, &shares[t]);
        if (!shares[t].started) work(&shares[t]);
    }
    int fine = 1;
    for (int64_t t = 0; t < threads; t++) {
        if (shares[t].started) pthread_join(shares[t].thread, NULL);
        fine &= shares[t].fine;
    }
    fine = fine && conclude(p, sums, count, (double)labelled);
    free(sums);
    free(means);
    return !fine;
}
