/* The mutual loss on the CPU: losses, statistics and gradients in one call.

Anything out of the ordinary (a logit or a loss that is not finite, a label that is no class, no
labelled row) ends the call with status 1, and the caller computes the loss in torch instead.

Sums: fp32 over at most FLUSH vectors in each lane, double beyond, blocks of rows in a fixed order,
so that results do not depend on the number of threads. Differences between peers come before any
sum, and identical peers diverge by exactly 0.

The loops over rows (`cpu_plain_rows.h`, `cpu_weighted_rows.h`) are compiled once for each width of
vectors, in cpu_rows_*.c, and the processor chooses. Python's ctypes calls `fastdml_mutual_loss`: its name
changes with its arguments, so that a library built from other code is not called. */

#include <pthread.h>
#include <stddef.h>

#include "cpu_rows.h"

/* Lanes of the vectors at most: 16 AVX-512, 8 AVX2, 4 neither. Tests lower it. */
int fastdml_widest = 16;

static Blocks *choose_blocks(void) {
#ifdef FASTDML_X86
    if (fastdml_widest >= 16 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2"))
        return fastdml_blocks_avx512;
    if (fastdml_widest >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2"))
        return fastdml_blocks_avx2;
#endif
    return fastdml_blocks_baseline;
}

typedef struct {
    const Problem *problem;
    Blocks *blocks;
    Sums *sums;
    int64_t begin, end;
    float *memory;
    int fine, started;
    pthread_t thread;
} Share;

static void *work(void *argument) {
    Share *own = argument;
    own->fine = own->blocks(own->problem, own->sums, own->begin, own->end, own->memory);
    return NULL;
}

/* Losses and packed statistics from the sums of all rows; 0 where a loss is infinite, because
   logits are so far apart that fp32 does not hold their difference. */
static int conclude(const Problem *p, const Sums *sums, int64_t blocks) {
    const int K = (int)p->K;
    const double *parts = (const double *)sums;
    const size_t size = sizeof(Sums) / sizeof(double);
    Sums t = sums[0];
    for (int64_t b = 1; b < blocks; b++)
        for (size_t i = 0; i < size; i++) ((double *)&t)[i] += parts[b * size + i];
    const double scale = p->temperature * p->temperature;
    const int averaged = p->reduction == MEAN;
    for (int k = 0; k < K; k++) {
        const double ce = t.ce[k], kl = scale * t.kl[k];
        if (!isfinite(ce + kl)) return 0;
        if (p->reduction != NONE)
            p->losses[k] = (float)(p->ce_weight * ce / (averaged ? p->ce_count : 1) +
                                   p->kl_weight * kl / (averaged ? p->kl_count : 1));
        if (!p->stats) continue;
        p->stats[p->at->ce + k] = (float)(ce / p->ce_count);
        p->stats[p->at->kl + k] = (float)(kl / p->kl_count);
        p->stats[p->at->entropy + k] = (float)(t.entropy[k] / p->kl_count);
        p->stats[p->at->correct + k] = (float)t.correct[k];
        for (int l = 0; l < K; l++)
            p->stats[p->at->pairwise_kl + l * K + k] = (float)(scale * t.pair[l][k] / p->kl_count);
    }
    if (p->stats) {
        p->stats[p->at->label_weight] = (float)p->ce_count;
        p->stats[p->at->labelled] = (float)p->labelled;
        p->stats[p->at->ensemble_correct] = (float)t.together;
    }
    return 1;
}

/* Counts the rows, each by its weight; 0 for a label that is no class, and where a mean would divide
   by 0. */
static int count_rows(Problem *p) {
    double labelled = 0, ce = 0, mimics = 0;
    for (int64_t n = 0; n < p->N; n++) {
        const int64_t y = label(p, n);
        const double count = p->sample_weight ? p->sample_weight[n] : 1;
        if (!(count >= 0) || !isfinite(count)) return 0;
        mimics += count;
        if (y == p->ignore_index) continue;
        if (y < 0 || y >= p->C) return 0;
        labelled += count;
        ce += p->class_weight ? count * p->class_weight[y] : count;
    }
    if (p->mimic_ignored && labelled == 0) ce = 1; /* the KL term alone teaches */
    p->labelled = labelled;
    p->ce_count = ce;
    p->kl_count = p->mimic_ignored ? mimics : labelled;
    return ce > 0 && p->kl_count > 0;
}

/* The teachers' weights before any gate; 0 where one is negative or not finite. */
static int read_edges(Problem *p, const float *peer_weights) {
    const float usual = p->gate == BEST ? 1 : 1 / (float)(p->K > 1 ? p->K - 1 : 1);
    for (int k = 0; k < p->K; k++)
        for (int l = 0; l < p->K; l++) {
            const float edge = peer_weights ? peer_weights[k * p->K + l] : usual;
            p->edges[k][l] = k == l ? 0 : edge;
            if (!(p->edges[k][l] >= 0 && p->edges[k][l] <= FLT_MAX)) return 0;
        }
    return 1;
}

/* The arguments as cpu_rows.py packs them: addresses are numbers. */
typedef struct {
    int64_t K, N, C, label_bytes, ignore_index, threads;
    int64_t reduction, divergence, target, gate, mimic_ignored;
    int64_t labels, losses, stats, stats_layout, peer_weights, class_weight, sample_weight;
    double temperature, smoothing, ce_weight, kl_weight, beta;
    struct {
        int64_t logits, grads, row_bytes, grad_row_bytes, type;
    } peers[PEERS]; /* K of them */
} Call;

/* Fills the problem; 0 where the caller must compute it otherwise. */
static int read_problem(Problem *p, const Call *call) {
    const float *peer_weights = (const float *)call->peer_weights;
    *p = (Problem){
        .K = call->K, .N = call->N, .C = call->C, .label_bytes = call->label_bytes,
        .ignore_index = call->ignore_index, .threads = call->threads,
        .reduction = call->reduction, .divergence = call->divergence, .target = call->target,
        .gate = call->gate, .mimic_ignored = call->mimic_ignored,
        .labels = (const char *)call->labels, .losses = (float *)call->losses,
        .stats = (float *)call->stats, .at = (const StatsLayout *)call->stats_layout,
        .class_weight = (const float *)call->class_weight,
        .sample_weight = (const float *)call->sample_weight, .temperature = call->temperature,
        .smoothing = call->smoothing, .ce_weight = call->ce_weight, .kl_weight = call->kl_weight,
        .beta = call->beta,
    };
    for (int k = 0; k < p->K; k++) {
        p->logits[k] = (const char *)call->peers[k].logits;
        p->grads[k] = (char *)call->peers[k].grads;
        p->row_bytes[k] = call->peers[k].row_bytes;
        p->grad_row_bytes[k] = call->peers[k].grad_row_bytes;
        p->types[k] = (int)call->peers[k].type;
        p->any_grads |= p->grads[k] != NULL;
    }
    if (p->target == ENSEMBLE && p->K <= 2) p->target = EACH_PEER; /* the mean of one */
    p->plain = !peer_weights && !p->class_weight && !p->sample_weight && p->reduction != NONE &&
               p->divergence == FORWARD && p->target != ENSEMBLE_LOGITS && p->gate == NO_GATE &&
               !p->mimic_ignored;
    for (int64_t c = 0; p->class_weight && c < p->C; c++) p->class_total += p->class_weight[c];
    if (!p->class_weight) p->class_total = (double)p->C;
    if (!count_rows(p) || !read_edges(p, peer_weights)) return 0;
    const int averaged = p->reduction == MEAN;
    p->ce_factor = (float)(p->ce_weight / (averaged ? p->ce_count : 1));
    p->kl_factor = (float)(p->kl_weight * p->temperature / (averaged ? p->kl_count : 1));
    return 1;
}

/* Computes the losses of a `Call`. Returns 0: done; 1: a case that the caller must compute otherwise,
   outputs are undefined; 2: no memory. */
int fastdml_mutual_loss(const char *packed) {
    Call call;
    memcpy(&call, packed, offsetof(Call, peers));
    memcpy(&call.peers, packed + offsetof(Call, peers), call.K * sizeof *call.peers);
    Problem problem, *p = &problem;
    if (!read_problem(p, &call)) return 1;
    const int64_t count = (p->N + BLOCK - 1) / BLOCK;
    int64_t threads = p->K * p->N * p->C / WORTH;
    if (threads > p->threads) threads = p->threads;
    if (threads > count) threads = count;
    if (threads > THREADS) threads = THREADS;
    if (threads < 1) threads = 1;
    const int64_t memory_size = scratch_floats(p->K, p->C);
    Sums *sums = malloc(count * sizeof *sums);
    float *memory = malloc(threads * memory_size * sizeof *memory);
    if (!sums || !memory) {
        free(sums);
        free(memory);
        return 2;
    }
    Blocks *blocks = choose_blocks();
    Share shares[THREADS];
    for (int64_t t = threads - 1; t >= 0; t--) { /* the calling thread's is last */
        shares[t] = (Share){.problem = p, .blocks = blocks, .sums = sums,
                            .begin = count * t / threads, .end = count * (t + 1) / threads,
                            .memory = memory + t * memory_size};
        shares[t].started = t && !pthread_create(&shares[t].thread, NULL, work, &shares[t]);
        if (!shares[t].started) work(&shares[t]);
    }
    int fine = 1;
    for (int64_t t = 0; t < threads; t++) {
        if (shares[t].started) pthread_join(shares[t].thread, NULL);
        fine &= shares[t].fine;
    }
    fine = fine && conclude(p, sums, count);
    free(sums);
    free(memory);
    return !fine;
}
