/* Random problems for the CPU's native loss: `rows_driver SEED N`. The answers to the usual loss are
held against plain double arithmetic; those with other options are only looked at for NaN, as tests in
Python compare them.

Built with a sanitizer, it finds what reads or writes beyond a row, what is undefined, and threads
that touch the same bytes: every tensor is an allocation of its own that ends with its last value. */

#include "../../kernels/fastdml_kernels/cpu_rows.h"

#include <stdio.h>

extern int fastdml_widest;
int fastdml_mutual_loss(const char *packed);

static uint64_t state;
static int64_t seed, problem;

static uint64_t draw(uint64_t below) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (state >> 11) % below;
}

static double normal(void) {
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += (double)draw(1 << 20) / (1 << 20);
    return sum;
}

static void fail(const char *what, int64_t k, int64_t at, double found, double want) {
    fprintf(stderr, "seed %d, problem %d: %s of peer %d at %d: %.9g, not %.9g\n", (int)seed,
            (int)problem, what, (int)k, (int)at, found, want);
    exit(1);
}

static void near(const char *what, int64_t k, int64_t at, double found, double want, double allowed) {
    if (!(fabs(found - want) <= allowed)) fail(what, k, at, found, want);
}

typedef struct {
    int64_t K, N, C, label_bytes, ignore_index, averaged, threads, stats, grads;
    int64_t stride[PEERS], grad_stride[PEERS];
    int types[PEERS];
    int64_t usual, reduction, divergence, target, gate, mimic_ignored;
    char *z[PEERS], *g[PEERS], *labels; /* a gradient may be NULL */
    float *weights[3];                  /* of peers, classes and samples, or NULL */
    double real[5]; /* temperature, smoothing, ce_weight, kl_weight, beta */
} Case;

static char *at(const Case *c, char *base, const int64_t *stride, int64_t k, int64_t n, int64_t i) {
    return base + size_of(c->types[k]) * (n * stride[k] + i);
}

static float value(const char *where, int type) {
    float x;
    uint16_t high;
    if (type == FLOAT32) {
        memcpy(&x, where, 4);
        return x;
    }
    memcpy(&high, where, 2);
    const uint32_t bits = (uint32_t)high << 16;
    memcpy(&x, &bits, 4);
    return x;
}

static double logit(const Case *c, int64_t k, int64_t n, int64_t i) {
    return value(at(c, c->z[k], c->stride, k, n, i), c->types[k]);
}

static double gradient(const Case *c, int64_t k, int64_t n, int64_t i) {
    return value(at(c, c->g[k], c->grad_stride, k, n, i), c->types[k]);
}

static void put(char *where, int type, float x) {
    if (type == FLOAT32) {
        memcpy(where, &x, 4);
        return;
    }
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t high = bits >> 16;
    memcpy(where, &high, 2);
}

static int64_t label_of(const Case *c, int64_t n) {
    int64_t y = 0;
    int32_t narrow;
    if (c->label_bytes == 8) memcpy(&y, c->labels + 8 * n, 8);
    else memcpy(&narrow, c->labels + 4 * n, 4), y = narrow;
    return y;
}

static void set_label(const Case *c, int64_t n, int64_t y) {
    const int32_t narrow = (int32_t)y;
    if (c->label_bytes == 8) memcpy(c->labels + 8 * n, &y, 8);
    else memcpy(c->labels + 4 * n, &narrow, 4);
}

static Case make(void) {
    static const int64_t few[] = {1, 2, 3, 7, 8, 9, 10, 15, 16, 17, 31, 33, 100, 101, 513, 1000};
    static const double T[] = {1, 1, 1, 0.5, 2, 4}, eps[] = {0, 0, 0, 0.1, 1}, w[] = {1, 1, 0.7, 0};
    Case c = {.K = 1 + draw(draw(4) ? 4 : PEERS), .N = 1 + draw(80), .C = few[draw(16)]};
    if (!draw(40)) c.K = 4, c.N = 500 + draw(200), c.C = 300; /* worth threads */
    c.label_bytes = draw(2) ? 8 : 4;
    c.ignore_index = draw(2) ? -100 : (int64_t)draw(c.C);
    c.averaged = draw(2), c.threads = 1 + draw(4), c.stats = draw(2), c.grads = draw(2);
    c.reduction = c.averaged ? MEAN : SUM, c.usual = draw(2), c.real[4] = 0.3;
    c.real[0] = T[draw(6)], c.real[1] = eps[draw(5)], c.real[2] = w[draw(4)], c.real[3] = w[draw(4)];
    const int mixed = draw(3) == 0;
    for (int64_t k = 0; k < c.K; k++) {
        c.types[k] = mixed && draw(2) ? BFLOAT16 : FLOAT32;
        c.stride[k] = c.C + (draw(2) ? draw(20) : 0);
        c.grad_stride[k] = c.C + (draw(2) ? draw(20) : 0);
        const int64_t size = size_of(c.types[k]);
        c.z[k] = malloc(size * ((c.N - 1) * c.stride[k] + c.C));
        c.g[k] = c.grads && draw(4) ? malloc(size * ((c.N - 1) * c.grad_stride[k] + c.C)) : NULL;
        const double spread = draw(2) ? 3 : 20;
        for (int64_t n = 0; n < c.N; n++)
            for (int64_t i = 0; i < c.C; i++)
                put(at(&c, c.z[k], c.stride, k, n, i), c.types[k], (float)(spread * normal()));
    }
    c.labels = malloc(c.label_bytes * c.N);
    for (int64_t n = 0; n < c.N; n++)
        set_label(&c, n, draw(5) ? (int64_t)draw(c.C) : c.ignore_index);
    if (c.usual) return c;
    c.reduction = draw(3), c.averaged = c.reduction == MEAN;
    c.divergence = draw(4), c.target = draw(3), c.gate = draw(5), c.mimic_ignored = draw(2);
    const int64_t sizes[] = {c.K * c.K, c.C, c.N};
    for (int i = 0; i < 3; i++) {
        if (draw(2)) continue;
        c.weights[i] = malloc(sizes[i] * sizeof(float));
        for (int64_t j = 0; j < sizes[i]; j++) c.weights[i][j] = (float)(draw(4) ? draw(100) : 0) / 50;
    }
    return c;
}

/* Puts the statistics one after the other, in an order of this program's own; how many numbers. */
static int64_t lay_out(int64_t K, StatsLayout *at) {
    int64_t size = 0;
    at->pairwise_kl = size, size += K * K;
    at->labelled = size, size += 1;
    at->correct = size, size += K;
    at->kl = size, size += K;
    at->ensemble_correct = size, size += 1;
    at->ce = size, size += K;
    at->label_weight = size, size += 1;
    at->entropy = size, size += K;
    return size;
}

static int call(const Case *c, float *losses, float *stats, const StatsLayout *layout) {
    union {
        int64_t whole[1];
        double real[1];
    } packed[23 + 5 * PEERS];
    const int64_t first[] = {
        c->K, c->N, c->C, c->label_bytes, c->ignore_index, c->threads, c->reduction,
        c->divergence, c->target, c->gate, c->mimic_ignored, (int64_t)c->labels, (int64_t)losses,
        (int64_t)(c->stats ? stats : NULL), (int64_t)layout, (int64_t)c->weights[0],
        (int64_t)c->weights[1], (int64_t)c->weights[2],
    };
    for (int i = 0; i < 18; i++) packed[i].whole[0] = first[i];
    for (int i = 0; i < 5; i++) packed[18 + i].real[0] = c->real[i];
    for (int64_t k = 0; k < c->K; k++) {
        const int64_t size = size_of(c->types[k]);
        const int64_t own[] = {(int64_t)c->z[k], (int64_t)c->g[k], size * c->stride[k],
                               size * c->grad_stride[k], c->types[k]};
        for (int i = 0; i < 5; i++) packed[23 + 5 * k + i].whole[0] = own[i];
    }
    return fastdml_mutual_loss((const char *)packed);
}

static double log_sum(const Case *c, int64_t k, int64_t n, double T) {
    double top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < c->C; i++) top = fmax(top, logit(c, k, n, i) / T);
    for (int64_t i = 0; i < c->C; i++) sum += exp(logit(c, k, n, i) / T - top);
    return top + log(sum);
}

/* Losses, statistics and gradients from the definitions. */
static void check(const Case *c, const float *losses, const float *stats,
                  const StatsLayout *layout) {
    const int64_t K = c->K;
    const double T = c->real[0], eps = c->real[1], little = 2e-4;
    double ce[PEERS] = {0}, kl[PEERS] = {0}, entropy[PEERS] = {0}, pair[PEERS][PEERS] = {{0}};
    int64_t labelled = 0, correct[PEERS] = {0};
    for (int64_t n = 0; n < c->N; n++) labelled += label_of(c, n) != c->ignore_index;
    const double per_row = c->averaged ? 1.0 / labelled : 1;
    for (int64_t n = 0; n < c->N; n++) {
        const int64_t y = label_of(c, n);
        if (y == c->ignore_index) {
            for (int64_t k = 0; k < K; k++)
                for (int64_t i = 0; i < c->C && c->g[k]; i++)
                    near("gradient without a label", k, n, gradient(c, k, n, i), 0, 0);
            continue;
        }
        double one[PEERS], hot[PEERS];
        for (int64_t k = 0; k < K; k++) one[k] = log_sum(c, k, n, 1), hot[k] = log_sum(c, k, n, T);
        for (int64_t k = 0; k < K; k++) {
            int64_t best = 0;
            for (int64_t i = 0; i < c->C; i++) {
                const double z = logit(c, k, n, i), log_p = z - one[k], p = exp(log_p);
                if (z > logit(c, k, n, best)) best = i;
                ce[k] -= ((i == y) * (1 - eps) + eps / c->C) * log_p;
                entropy[k] -= p * log_p;
                double pull = 0;
                for (int64_t l = 0; l < K; l++) {
                    const double log_q = z / T - hot[k], log_t = logit(c, l, n, i) / T - hot[l];
                    pair[l][k] += T * T * exp(log_t) * (log_t - log_q);
                    if (l != k) pull += (exp(log_q) - exp(log_t)) / (K - 1);
                }
                if (!c->g[k]) continue;
                const double want = per_row * (c->real[2] * (p - (i == y) * (1 - eps) - eps / c->C) +
                                               c->real[3] * T * pull);
                const double found = gradient(c, k, n, i);
                const double rounding = c->types[k] == BFLOAT16 ? fabs(want) / 128 : 0;
                near("gradient", k, n, found, want, little * per_row * (1 + T) + rounding);
            }
            correct[k] += best == y;
        }
    }
    if (c->stats) {
        near("labelled rows", 0, 0, stats[layout->labelled], labelled, 0);
        near("label weight", 0, 0, stats[layout->label_weight], labelled, 0);
    }
    for (int64_t k = 0; k < K; k++) {
        for (int64_t l = 0; l < K; l++)
            if (l != k) kl[k] += pair[l][k] / (K - 1);
        const double scale = little * (1 + labelled) * (1 + T * T);
        const double want = per_row * (c->real[2] * ce[k] + c->real[3] * kl[k]);
        near("loss", k, 0, losses[k], want, per_row * scale);
        if (!c->stats) continue;
        near("cross-entropy", k, 0, stats[layout->ce + k] * labelled, ce[k], scale);
        near("divergence", k, 0, stats[layout->kl + k] * labelled, kl[k], scale);
        near("entropy", k, 0, stats[layout->entropy + k] * labelled, entropy[k], scale);
        near("hits", k, 0, stats[layout->correct + k], correct[k], 0);
        for (int64_t l = 0; l < K; l++)
            near("pair", k, l, stats[layout->pairwise_kl + l * K + k] * labelled, pair[l][k], scale);
    }
}

/* Losses and gradients with any options. */
static void check_finite(const Case *c, const float *losses) {
    for (int64_t i = 0; i < c->K * (c->reduction == NONE ? c->N : 1); i++)
        near("loss less itself", 0, i, losses[i] - losses[i], 0, 0);
    for (int64_t k = 0; k < c->K; k++)
        for (int64_t n = 0; n < c->N && c->g[k]; n++)
            for (int64_t i = 0; i < c->C; i++)
                near("gradient less itself", k, n, gradient(c, k, n, i) - gradient(c, k, n, i), 0, 0);
}

/* What the function must hand back: 1 and nothing to rely on. */
static int spoil(const Case *c) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    const int64_t k = draw(c->K), n = draw(c->N);
    switch (draw(6)) {
    case 0:
        if (label_of(c, n) == c->ignore_index) return 0;
        put(at(c, c->z[k], c->stride, k, n, draw(c->C)), c->types[k], bad[draw(3)]);
        return 1;
    case 1:
        if (c->ignore_index == c->C) return 0;
        set_label(c, n, draw(2) ? c->C : -1 - (int64_t)draw(50));
        return 1;
    case 2:
        for (int64_t i = 0; i < c->N; i++) set_label(c, i, c->ignore_index);
        return 1;
    }
    return 0;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    seed = atoll(argv[1]);
    const int64_t number = atoll(argv[2]);
    for (problem = 0; problem < number; problem++) {
        state = 0x9e3779b97f4a7c15u * (uint64_t)(seed * 1000003 + problem + 1) | 1;
        for (int i = 0; i < 8; i++) draw(2);
        const Case c = make();
        int64_t labelled = 0;
        for (int64_t i = 0; i < c.N; i++) labelled += label_of(&c, i) != c.ignore_index;
        const int refused = (draw(4) == 0 && c.usual && spoil(&c)) || !labelled;
        fastdml_widest = 4 << draw(3);
        float *losses = malloc(c.K * (c.reduction == NONE ? c.N : 1) * sizeof *losses);
        StatsLayout layout;
        float *stats = malloc(lay_out(c.K, &layout) * sizeof *stats);
        const int status = call(&c, losses, stats, &layout);
        if (c.usual && status != refused) fail("status", 0, 0, status, refused);
        if (c.usual && !refused) check(&c, losses, stats, &layout);
        if (!c.usual && !status) check_finite(&c, losses);
        for (int64_t k = 0; k < c.K; k++) free(c.z[k]), free(c.g[k]);
        for (int i = 0; i < 3; i++) free(c.weights[i]);
        free(c.labels), free(losses), free(stats);
    }
    printf("%d problems of seed %d\n", (int)number, (int)seed);
    return 0;
}
