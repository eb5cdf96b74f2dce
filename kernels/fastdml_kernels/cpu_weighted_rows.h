/* Rows of every other loss: teachers, classes and rows that count differently, each divergence,
   mixed teachers, rows without a label that mimic. O(K^2 C) work.

   A row of every peer is copied to scratch memory, less its maximum and padded to whole vectors
   with classes of probability 0, which add nothing to any sum. Then one student after the other
   meets its teachers. */

enum { PADDING = -100 }; /* logit / max(T, 1) of the padding, less the row's maximum */

/* One sample. */
typedef struct {
    float *x[PEERS], *e[PEERS], *e_t[PEERS]; /* logits less their maximum, softmax at 1 and at T */
    float *mean, *mixed, *log_mixed, *pull, *slope; /* scratch that all peers share */
    int64_t y;
    int labelled;
    double log_sum[PEERS], entropy[PEERS], ce[PEERS], kl[PEERS];
    float offset[PEERS];         /* log of the normaliser at T */
    int right[PEERS];            /* whether the label's logit is the first of the largest */
    float edges[PEERS][PEERS];   /* as the gate leaves them, [student][teacher] */
} Sample;

/* The logits of a row, less their maximum, to x; 0 where one is not finite. */
INLINE int copy_row(const char *z, int type, int64_t C, float padding, float *x) {
    const int64_t whole = C - C % LANES;
    vec high = all(load_one(z, type, 0)), trouble = all(0);
    for (int64_t c = 0; c < whole; c += LANES) {
        const vec values = load(z, type, c);
        put(x, c, values);
        high = maximum(values, high);
        trouble = muladd(values, all(0), trouble);
    }
    float top = largest(high);
    int fine = !any_nan(trouble);
    for (int64_t c = whole; c < C; c++) {
        x[c] = load_one(z, type, c);
        fine &= isfinite(x[c]) != 0;
        if (x[c] > top) top = x[c];
    }
    if (!fine) return 0;
    for (int64_t c = 0; c < C; c += LANES) put(x, c, get(x, c) - top);
    for (int64_t c = C; c < padded(C); c++) x[c] = padding;
    return 1;
}

/* Sums over the classes of p log p and of weight log p, where log p = x - log_sum. */
INLINE void log_sums(const float *x, const float *e, const float *weight, int64_t C, float log_sum,
                     double *entropy, double *smooth) {
    *entropy = *smooth = 0;
    for (int64_t start = 0; start < C; start += FLUSH * LANES) {
        const int64_t end = start + FLUSH * LANES < C ? start + FLUSH * LANES : C;
        vec uncertain = all(0), towards_all = all(0);
        for (int64_t c = start; c < end; c += LANES) {
            const vec log_p = get(x, c) - log_sum;
            uncertain = muladd(get(e, c), log_p, uncertain);
            if (weight) towards_all = muladd(get(weight, c), log_p, towards_all);
        }
        *entropy -= total(uncertain);
        if (weight) *smooth += total(towards_all);
    }
}

/* A peer's probabilities, cross-entropy and entropy; 0 where a logit is not finite. */
static int prepare(const Problem *p, Sample *s, int k, int64_t n, const float *weights) {
    const int64_t C = p->C;
    const float T = (float)p->temperature, inverse_t = (float)(1 / p->temperature);
    if (!copy_row(p->logits[k] + n * p->row_bytes[k], p->types[k], C,
                  PADDING * (T > 1 ? T : 1), s->x[k]))
        return 0;
    const double sum = exponentials_of(s->x[k], C, 1, s->e[k]);
    const float log_sum = (float)log(sum);
    s->log_sum[k] = s->offset[k] = log_sum;
    scale_row(s->e[k], C, (float)(1 / sum));
    if (s->e_t[k] != s->e[k]) {
        const double sum_t = exponentials_of(s->x[k], C, inverse_t, s->e_t[k]);
        s->offset[k] = (float)log(sum_t);
        scale_row(s->e_t[k], C, (float)(1 / sum_t));
    }
    double smooth = 0;
    s->entropy[k] = s->ce[k] = 0;
    s->right[k] = 0;
    const int smoothed = p->smoothing != 0 && s->labelled;
    if (p->stats || p->gate == ENTROPY || smoothed)
        log_sums(s->x[k], s->e[k], smoothed ? weights : NULL, C, log_sum, &s->entropy[k], &smooth);
    if (!s->labelled) return 1;
    const double weight = p->class_weight ? p->class_weight[s->y] : 1;
    const float at_y = s->x[k][s->y];
    s->ce[k] = (1 - p->smoothing) * weight * (s->log_sum[k] - at_y) -
               p->smoothing / (double)C * smooth;
    if (at_y == 0) {
        int64_t c = 0;
        while (s->x[k][c] != 0) c++;
        s->right[k] = c == s->y;
    }
    return 1;
}

/* A soft gate's weights of student k's teachers: E g_l e_kl / sum g_l e_kl, where E = sum e_kl and
   g_l = exp(value_l), relative to the largest of those that count. */
static void soften(const Problem *p, Sample *s, int k, const double *value) {
    double best = -INFINITY, all_edges = 0, sum = 0, weight[PEERS];
    for (int l = 0; l < p->K; l++) {
        if (l == k || p->edges[k][l] == 0) continue;
        all_edges += p->edges[k][l];
        if (value[l] > best) best = value[l];
    }
    for (int l = 0; l < p->K; l++) {
        const int counts = l != k && p->edges[k][l] != 0;
        weight[l] = counts ? p->edges[k][l] * exp(value[l] - best) : 0;
        sum += weight[l];
    }
    for (int l = 0; l < p->K; l++)
        s->edges[k][l] = sum > 0 ? (float)(all_edges * (weight[l] / sum)) : 0;
}

/* How much each peer learns from each on this row. */
static void open_gates(const Problem *p, Sample *s) {
    double value[PEERS];
    int best = 0;
    for (int k = 0; k < p->K; k++) {
        const double log_p = s->labelled ? s->x[k][s->y] - s->log_sum[k] : 0;
        value[k] = p->gate == ENTROPY ? -s->entropy[k] : log_p;
        if (value[k] > value[best]) best = k;
    }
    for (int k = 0; k < p->K; k++) {
        if (p->gate == ENTROPY || (p->gate == CONFIDENCE && s->labelled)) {
            soften(p, s, k, value);
            continue;
        }
        for (int l = 0; l < p->K; l++) {
            int open = p->gate == NO_GATE;
            if (p->gate == CORRECT) open = s->right[l];
            if (p->gate == BEST) open = s->labelled && l == best;
            s->edges[k][l] = open && l != k ? p->edges[k][l] : 0;
        }
    }
}

/* Student k against its teachers: its term of the loss, and with `grads` the gradient with respect to
   z / T in s->pull. Returns whether it has a teacher. */
static int learn(const Problem *p, Sample *s, const Distribution *peers, int k, int grads) {
    Distribution teachers[PEERS], mixed;
    float weights[PEERS], shares[PEERS], sum = 0;
    float *pull = grads ? s->pull : NULL;
    const Distribution *own = &peers[k];
    int count = 0;
    for (int l = 0; l < p->K; l++) {
        if (s->edges[k][l] < FLT_MIN) continue;
        teachers[count] = peers[l];
        sum += weights[count++] = s->edges[k][l];
    }
    if (!count) return 0;
    if (p->target != EACH_PEER) {
        const float T = (float)p->temperature;
        for (int l = 0; l < count; l++) shares[l] = weights[l] / sum;
        if (p->target == ENSEMBLE) {
            float *pull_of_each = p->divergence == FORWARD ? pull : NULL;
            mixed = mix_probabilities(p->C, own, teachers, weights, shares, count, s->mixed,
                                      s->log_mixed, pull_of_each);
            if (pull_of_each) pull = NULL; /* is found */
        } else {
            mixed = mix_logits(p->C, teachers, shares, count, PADDING * (T > 1 ? T : 1), s->mixed,
                               s->log_mixed);
        }
        teachers[0] = mixed;
        weights[0] = sum;
        count = 1;
    }
    if (p->divergence == JEFFREYS)
        for (int l = 0; l < count; l++) weights[l] *= 0.5f;
    const float beta = (float)p->beta;
    const int64_t C = p->C;
    if (p->divergence == FORWARD)
        s->kl[k] = meet(C, own, teachers, weights, count, FORWARD, beta, pull, s->slope);
    else if (p->divergence == REVERSE)
        s->kl[k] = meet(C, own, teachers, weights, count, REVERSE, beta, pull, s->slope);
    else if (p->divergence == JEFFREYS)
        s->kl[k] = meet(C, own, teachers, weights, count, JEFFREYS, beta, pull, s->slope);
    else
        s->kl[k] = meet(C, own, teachers, weights, count, JSD, beta, pull, s->slope);
    return 1;
}

/* Writes peer k's gradient; pull: as `learn` leaves it, or NULL. count: of the row. */
static void write_gradient(const Problem *p, const Sample *s, int k, char *g, double count,
                           const float *weights, const float *pull) {
    const int64_t C = p->C;
    const int type = p->types[k];
    const float ce = s->labelled ? (float)(p->ce_factor * count) : 0;
    const float kl = (float)(p->kl_factor * count);
    const float of_label = p->class_weight ? p->class_weight[s->labelled ? s->y : 0] : 1;
    const float spread = (float)(p->smoothing / (double)C);
    const float hit = ce * (float)(1 - p->smoothing) * of_label;
    const vec scale = all(hit + ce * spread * (float)p->class_total), smooth = all(-ce * spread);
    for (int64_t c = 0; c < C; c += LANES) {
        vec grad = get(s->e[k], c) * scale;
        if (spread != 0) grad = muladd(get(weights, c), smooth, grad);
        if (pull) grad = muladd(get(pull, c), all(kl), grad);
        if (s->labelled && c <= s->y && s->y < c + LANES) grad -= at_label(s->y, c, hit);
        if (c + LANES <= C) {
            store(g, type, c, grad);
        } else {
            char last[4 * LANES];
            store(last, type, 0, grad);
            memcpy(g + c * size_of(type), last, (C - c) * size_of(type));
        }
    }
}

/* KL(l || k) of all pairs, and whether the label is the likeliest class of all peers together. */
static void add_statistics(const Problem *p, const Sample *s, const Distribution *peers,
                           double count, Sums *sums) {
    const int K = (int)p->K;
    const float one = 1;
    for (int k = 0; k < K; k++) {
        sums->entropy[k] += count * s->entropy[k];
        if (s->labelled) sums->correct[k] += count * s->right[k];
        for (int l = 0; l < K; l++)
            if (l != k)
                sums->pair[l][k] +=
                    count * meet(p->C, &peers[k], &peers[l], &one, 1, FORWARD, 0, NULL, NULL);
    }
    if (!s->labelled) return;
    for (int64_t c = 0; c < p->C; c += LANES) {
        vec sum = all(0);
        for (int k = 0; k < K; k++) sum += get(s->e[k], c);
        put(s->mean, c, sum);
    }
    int64_t c = 0;
    const float at_y = s->mean[s->y];
    while (c < p->C && (c < s->y ? s->mean[c] < at_y : s->mean[c] <= at_y)) c++;
    if (c == p->C) sums->together += count;
}

/* A row that counts `count` times. */
static int weighted_row(const Problem *p, Sample *s, int64_t n, double count, Sums *sums,
                        const float *weights) {
    const int K = (int)p->K;
    const float factor = p->temperature == 1 ? 1 : (float)(1 / p->temperature);
    Distribution peers[PEERS];
    for (int k = 0; k < K; k++) {
        if (!prepare(p, s, k, n, weights)) return 0;
        peers[k] = (Distribution){s->e_t[k], s->x[k], factor, s->offset[k]};
    }
    const int mutual = K > 1 && (p->kl_weight != 0 || p->stats);
    if (mutual) open_gates(p, s);
    for (int k = 0; k < K; k++) {
        s->kl[k] = 0;
        char *g = p->grads[k] ? p->grads[k] + n * p->grad_row_bytes[k] : NULL;
        const int taught = mutual && learn(p, s, peers, k, g != NULL);
        if (g) write_gradient(p, s, k, g, count, weights, taught ? s->pull : NULL);
        sums->ce[k] += count * s->ce[k];
        sums->kl[k] += count * s->kl[k];
        if (p->reduction == NONE)
            p->losses[k * p->N + n] =
                (float)(count * (p->ce_weight * s->ce[k] +
                                 p->kl_weight * p->temperature * p->temperature * s->kl[k]));
    }
    if (p->stats) add_statistics(p, s, peers, count, sums);
    return 1;
}

/* The rows `begin` to `end`; 0 where one that counts holds a logit that is not finite. */
static int weighted_rows(const Problem *p, int64_t begin, int64_t end, Sums *sums, float *memory) {
    const int K = (int)p->K;
    const int tempered = p->temperature != 1 && K > 1;
    const int64_t width = padded(p->C);
    Sample s;
    float *weights = memory; /* of the classes, 0 in the padding */
    s.mean = memory + width;
    s.mixed = memory + 2 * width;
    s.log_mixed = memory + 3 * width;
    s.pull = memory + 4 * width;
    s.slope = memory + 5 * width;
    memory += 6 * width;
    for (int k = 0; k < K; k++) {
        s.x[k] = memory + 3 * k * width;
        s.e[k] = s.x[k] + width;
        s.e_t[k] = tempered ? s.e[k] + width : s.e[k];
    }
    for (int64_t c = 0; c < width; c++)
        weights[c] = c >= p->C ? 0 : p->class_weight ? p->class_weight[c] : 1;
    for (int64_t n = begin; n < end; n++) {
        s.y = label(p, n);
        s.labelled = s.y != p->ignore_index;
        const double count = p->sample_weight ? p->sample_weight[n] : 1;
        if (count != 0 && (s.labelled || p->mimic_ignored)) {
            if (!weighted_row(p, &s, n, count, sums, weights)) return 0;
            continue;
        }
        for (int k = 0; k < K; k++) {
            if (p->grads[k])
                memset(p->grads[k] + n * p->grad_row_bytes[k], 0, p->C * size_of(p->types[k]));
            if (p->reduction == NONE) p->losses[k * p->N + n] = 0;
        }
    }
    return 1;
}
