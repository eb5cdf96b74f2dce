/* What the files of the CPU's loss share: a call's problem, and the sums over its rows. */

#ifndef FASTDML_CPU_ROWS_H
#define FASTDML_CPU_ROWS_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    PEERS = 16,      /* at most */
    BLOCK = 32,      /* rows whose sums are kept together */
    THREADS = 64,    /* at most */
    WORTH = 1 << 18, /* logits for each thread that is started */
};

/* As numbered in cpu_rows.py. */
enum { FLOAT32, BFLOAT16 };
enum { MEAN, SUM, NONE };
enum { FORWARD, REVERSE, JEFFREYS, JSD };
enum { EACH_PEER, ENSEMBLE, ENSEMBLE_LOGITS };
enum { NO_GATE, CORRECT, BEST, CONFIDENCE, ENTROPY };

/* Where each of the packed statistics begins: the numbers of StatsLayout in stats_layout.py. */
typedef struct {
    int64_t ce, kl, label_weight, labelled, entropy, correct, ensemble_correct, pairwise_kl;
} StatsLayout;

typedef struct {
    int64_t K, N, C, label_bytes, ignore_index, threads;
    int64_t reduction, divergence, target, gate, mimic_ignored;
    const char *labels;
    float *losses, *stats; /* (K,) or (K, N); packed statistics, NULL where not wanted */
    const StatsLayout *at;
    const float *class_weight, *sample_weight;       /* (C,), (N,); NULL where all are 1 */
    const char *logits[PEERS];
    char *grads[PEERS];                              /* NULL for a peer that only teaches */
    int64_t row_bytes[PEERS], grad_row_bytes[PEERS]; /* from one row to the next */
    int types[PEERS];                                /* of logits and gradients */
    double temperature, smoothing, ce_weight, kl_weight, beta; /* beta: of JSD */
    float edges[PEERS][PEERS];                       /* [student][teacher] */

    int any_grads, plain; /* plain: rows for `plain_rows`; else for `weighted_rows` */
    double class_total;   /* of the class weights */
    double labelled, ce_count, kl_count; /* rows with a label; what the means are divided by */
    float ce_factor, kl_factor;          /* of the gradients */
} Problem;

/* Sums over a block of rows; doubles only, which are added up block by block. */
typedef struct {
    double ce[PEERS], kl[PEERS]; /* kl: without T**2 */
    double entropy[PEERS], correct[PEERS], together;
    double pair[PEERS][PEERS]; /* KL(teacher || student), [teacher][student] */
} Sums;

/* The rows of blocks `begin` to `end`, their sums to sums[begin..end - 1]; `memory`: scratch of
   scratch_floats() for this thread alone. Returns 0 where a logit or a loss is not finite. One
   variant for each width of vectors, in a file of its own. */
typedef int Blocks(const Problem *p, Sums *sums, int64_t begin, int64_t end, float *memory);
Blocks fastdml_blocks_baseline;
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTDML_X86
Blocks fastdml_blocks_avx2, fastdml_blocks_avx512;
#endif

enum { WIDEST = 16 }; /* lanes of a vector, in any variant */

/* Classes that a row in scratch memory has room for. */
static inline int64_t padded(int64_t C) { return (C + 2 * WIDEST - 1) / WIDEST * WIDEST; }

enum {
    GROUP = 8,              /* rows at most that `plain_rows` normalises together */
    GROUP_FLOATS = 1 << 12, /* of their logits at most, whose exponentials then stay in the cache */
};

static inline int64_t plain_group(int64_t K, int64_t C) {
    const int64_t group = GROUP_FLOATS / (K * padded(C));
    return group < 1 ? 1 : group > GROUP ? GROUP : group;
}

/* Three rows a peer and six rows that all peers share, or two rows a peer for each sample of a group
   and one; and a vector to align them. */
static inline int64_t scratch_floats(int64_t K, int64_t C) {
    const int64_t weighted = 3 * K + 6, plain = 2 * K * plain_group(K, C) + 1;
    return (weighted > plain ? weighted : plain) * padded(C) + WIDEST;
}

static inline int64_t label(const Problem *p, int64_t row) {
    return p->label_bytes == 8 ? ((const int64_t *)p->labels)[row]
                               : ((const int32_t *)p->labels)[row];
}

static inline int size_of(int type) { return type == FLOAT32 ? 4 : 2; }

#endif
