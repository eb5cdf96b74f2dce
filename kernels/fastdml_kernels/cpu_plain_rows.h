/* Rows of the usual loss: every other peer is a teacher of the same weight, the divergence is the
   forward one, rows and classes count alike. O(K C) work, O(K^2 C) with statistics. Where the mean of
   the other peers' probabilities is the teacher, the loss takes another O(K^2 C), and the gradients
   are these same ones, bit for bit, as cross-entropy is linear in its target.

   Each peer's row is read for its maximum, for its normalisers and for everything else, the last
   two times from cache; exponentials wait in scratch memory; a gradient is written once. */

/* The sums that are accumulated as vectors; `flush` adds their lanes to `Totals`. */
typedef struct {
    vec energy, pull[PEERS], entropy[PEERS], towards_all[PEERS], cross[PEERS][PEERS], mixed[PEERS];
    int vectors;
} Lanes;

typedef struct {
    double energy; /* of q_l d_l over all l, where d_l = log q_l - max over the peers of log q */
    double pull[PEERS]; /* d_k, times the sum of all q */
    double cross[PEERS][PEERS]; /* q_l d_k */
} Totals;

/* One sample: a row of every peer, its maximum (top) and normalisers relative to that. */
typedef struct {
    const char *z[PEERS];
    char *g[PEERS];                 /* NULL for a peer that only teaches */
    float *e[PEERS], *e_t[PEERS];   /* exp(z - top) and, at another temperature than 1, of / T */
    float *mean;                    /* sum of the peers' probabilities */
    int64_t n, y;
    float top[PEERS];
    const float *log_sum, *log_sum_t, *scale, *scale_t;
    char copies[2][PEERS][4 * LANES]; /* of logits and gradients, where C < LANES */
} Row;

/* Sums of exponentials, each at least 1, of several rows and peers: first as they are, and less 1
   for those near 1; then their reciprocals and logarithms. */
typedef struct {
    float sum[GROUP * PEERS], less_1[GROUP * PEERS], scale[GROUP * PEERS], log_sum[GROUP * PEERS];
} Normalisers;

/* A row is read in whole vectors. Where C is no multiple of LANES, the last vector overlaps the
   previous one; `fresh` masks lanes already counted, so that no sum has them twice, and a gradient
   that is stored twice has the same value. Rows of fewer than LANES values are padded copies. */
INLINE int64_t whole_vectors(int64_t C) { return C - C % LANES; }
INLINE int64_t last_vector(int64_t C) { return C < LANES ? 0 : C - LANES; }

INLINE vec fresh(vec x, int64_t C) {
    const ints lane = lane_numbers();
    const ints mask = C < LANES ? lane < (int)C : lane >= (int)(LANES - C % LANES);
    return (vec)((ints)x & mask);
}

INLINE void begin_sums(Lanes *lanes, Totals *totals, int K, int stats, int mixed) {
    lanes->energy = all(0);
    lanes->vectors = 0;
    totals->energy = 0;
    for (int k = 0; k < K; k++) {
        lanes->pull[k] = lanes->towards_all[k] = all(0);
        totals->pull[k] = 0;
        if (mixed) lanes->mixed[k] = all(0);
        if (!stats) continue;
        lanes->entropy[k] = all(0);
        for (int l = 0; l < K; l++) {
            lanes->cross[l][k] = all(0);
            totals->cross[l][k] = 0;
        }
    }
}

INLINE void flush(Lanes *lanes, Totals *totals, Sums *sums, int K, double spread, int stats,
                  int mixed) {
    totals->energy += total(lanes->energy);
    lanes->energy = all(0);
    for (int k = 0; k < K; k++) {
        totals->pull[k] += total(lanes->pull[k]);
        lanes->pull[k] = all(0);
        if (mixed) {
            sums->kl[k] += total(lanes->mixed[k]);
            lanes->mixed[k] = all(0);
        }
        if (spread != 0) {
            sums->ce[k] -= spread * total(lanes->towards_all[k]);
            lanes->towards_all[k] = all(0);
        }
        if (!stats) continue;
        sums->entropy[k] -= total(lanes->entropy[k]);
        lanes->entropy[k] = all(0);
        for (int l = 0; l < K; l++) {
            totals->cross[l][k] += total(lanes->cross[l][k]);
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
        trouble = muladd(x, all(0), trouble); /* NaN, once x is not finite */
    }
    return any_nan(trouble) ? NAN : largest(high);
}

/* exp of z - top to e, and of (z - top) / T to e_t where tempered, and their sums. */
INLINE void exponentials(const char *z, int type, int64_t C, float top, float inverse_t,
                         int tempered, float *e, float *e_t, double *sum, double *sum_t) {
    vec part = all(0), part_t = all(0);
    *sum = *sum_t = 0;
    for (int64_t c = 0; c < whole_vectors(C); c += LANES) {
        const vec x = load(z, type, c) - top, one = exp_(x);
        put(e, c, one);
        part += one;
        if (tempered) {
            const vec hot = exp_(x * inverse_t);
            put(e_t, c, hot);
            part_t += hot;
        }
        if (c / LANES % FLUSH == FLUSH - 1) {
            *sum += total(part);
            part = all(0);
            if (tempered) {
                *sum_t += total(part_t);
                part_t = all(0);
            }
        }
    }
    if (C % LANES) {
        const int64_t c = last_vector(C);
        const vec x = load(z, type, c) - top, one = exp_(x);
        put(e, c, one);
        part += fresh(one, C);
        if (tempered) {
            const vec hot = exp_(x * inverse_t);
            put(e_t, c, hot);
            part_t += fresh(hot, C);
        }
    }
    *sum += total(part);
    if (tempered) *sum_t += total(part_t);
}

/* What `terms` reads of a row. Copied from the problem and the row, as a store to a gradient might
   change those, for all that the compiler knows, and they would be read anew for each vector. */
typedef struct {
    const char *z[PEERS];
    char *g[PEERS];
    const float *e[PEERS], *q[PEERS]; /* exponentials at 1 and at T */
    float *mean;
    float top[PEERS], log_sum[PEERS], log_sum_t[PEERS], scale[PEERS], scale_t[PEERS];
    int types[PEERS];
    int64_t C, y;
    float inverse_t, spread, pair, ce, hit;
} View;

INLINE View view_of(const Problem *p, const Row *row, int K, int narrow, int tempered) {
    View v; /* no initialiser, which would write all of it */
    v.mean = row->mean;
    v.C = p->C;
    v.y = row->y;
    v.inverse_t = (float)(1 / p->temperature);
    v.spread = (float)(p->smoothing / (double)p->C);
    v.pair = K > 1 ? p->kl_factor / (float)(K - 1) : 0;
    v.ce = p->ce_factor;
    v.hit = p->ce_factor * (float)(1 - p->smoothing);
    for (int k = 0; k < K; k++) {
        v.z[k] = row->z[k];
        v.g[k] = row->g[k];
        v.e[k] = row->e[k];
        v.top[k] = row->top[k];
        v.log_sum[k] = row->log_sum[k];
        v.scale[k] = row->scale[k];
        v.types[k] = narrow ? p->types[k] : FLOAT32;
        if (!tempered) continue;
        v.q[k] = row->e_t[k];
        v.log_sum_t[k] = row->log_sum_t[k];
        v.scale_t[k] = row->scale_t[k];
    }
    return v;
}

/* Adds m (log m - log q_k) of LANES classes for every peer k, m the mean of the other peers' q, to
   `sums`; gap: log q less its largest, whose q is `most`. All is found relative to that peer, so that m
   is exactly q where all are equal; where it is k itself and so far ahead that the others' ratios
   stop at exp(-87), so does their part in the sum. */
INLINE void add_towards_means(const vec *gap, vec most, int K, vec *sums) {
    const vec share = all(1 / (float)(K - 1));
    vec ratios[PEERS], less_1[PEERS];
    for (int l = 0; l < K; l++) ratios[l] = exp_and_expm1(gap[l], &less_1[l]);
    for (int k = 0; k < K; k++) {
        vec sum = all(0), sum_less_1 = all(0);
        for (int l = 0; l < K; l++) {
            if (l == k) continue;
            sum_less_1 = muladd(less_1[l], share, sum_less_1);
            sum = muladd(ratios[l], share, sum);
        }
        const ints near = sum_less_1 > -0.5f;
        const vec ratio = choose(near, sum_less_1 + 1.0f, sum);
        const vec log_ratio = log_(ratio, choose(near, sum_less_1, ratio - 1.0f));
        sums[k] = muladd(most * ratio, log_ratio - gap[k], sums[k]);
    }
}

/* The terms of LANES classes from c on; `part` marks the last vector, which overlaps the previous.
   All of this is inlined, so that a flag that is off costs nothing where `plain_block` gets it as a
   constant. */
INLINE void terms(const View *v, Lanes *lanes, int64_t c, int part, int K, int tempered, int stats,
                  int grads, int mixed) {
    vec prob[PEERS], q[PEERS], gap[PEERS], top = all(-INFINITY), sum = all(0), together = all(0);
    for (int k = 0; k < K; k++) {
        const vec x = load(v->z[k], v->types[k], c) - v->top[k];
        const vec log_p = x - v->log_sum[k];
        prob[k] = get(v->e[k], c) * v->scale[k];
        if (v->spread != 0) lanes->towards_all[k] += part ? fresh(log_p, v->C) : log_p;
        if (stats) {
            const vec counted = part ? fresh(prob[k], v->C) : prob[k];
            lanes->entropy[k] = muladd(counted, log_p, lanes->entropy[k]);
            together += prob[k];
        }
        gap[k] = tempered ? muladd(x, all(v->inverse_t), all(-v->log_sum_t[k])) : log_p;
        q[k] = tempered ? get(v->q[k], c) * v->scale_t[k] : prob[k];
        top = maximum(gap[k], top);
        sum += q[k];
    }
    for (int k = 0; k < K; k++) {
        gap[k] -= top;
        if (part) gap[k] = fresh(gap[k], v->C);
        lanes->energy = muladd(q[k], gap[k], lanes->energy);
        lanes->pull[k] = muladd(sum, gap[k], lanes->pull[k]);
    }
    if (mixed) {
        vec most = q[0];
        for (int k = 1; k < K; k++) most = maximum(q[k], most);
        add_towards_means(gap, most, K, lanes->mixed);
    }
    if (stats) {
        for (int l = 0; l < K; l++)
            for (int k = 0; k < K; k++)
                lanes->cross[l][k] = muladd(q[l], gap[k], lanes->cross[l][k]);
        put(v->mean, c, together);
    }
    if (grads) {
        const int hits = c <= v->y && v->y < c + LANES;
        vec apart = all(0);
        for (int k = 1; k < K; k++) apart += q[k] - q[0];
        for (int k = 0; k < K; k++) {
            if (!v->g[k]) continue;
            const vec away = muladd(q[k] - q[0], all((float)K), -apart);
            vec grad = muladd(all(v->pair), away, v->ce * (prob[k] - v->spread));
            if (hits) grad -= at_label(v->y, c, v->hit);
            store(v->g[k], v->types[k], c, grad);
        }
    }
    lanes->vectors++;
}

INLINE void add_sum(Normalisers *of, int at, double sum) {
    of->sum[at] = (float)sum;
    of->less_1[at] = (float)(sum - 1);
}

/* Of all at once: the C library's log, one after the other, takes a quarter of the time of short
   rows. */
INLINE void normalise(Normalisers *of, int count) {
    for (; count % LANES; count++) add_sum(of, count, 1);
    for (int i = 0; i < count; i += LANES) {
        const vec sum = get(of->sum, i);
        put(of->scale, i, 1.0f / sum);
        put(of->log_sum, i, log_(sum, get(of->less_1, i)));
    }
}

/* Maxima, exponentials and their sums of a row of all peers; 0 where a logit is not finite. */
INLINE int read_row(const Problem *p, Row *row, Normalisers *of, Normalisers *of_t, int at, int K,
                    int narrow, int tempered, int grads) {
    const int64_t C = p->C;
    for (int k = 0; k < K; k++) {
        const int type = narrow ? p->types[k] : FLOAT32;
        row->z[k] = p->logits[k] + row->n * p->row_bytes[k];
        row->g[k] = grads && p->grads[k] ? p->grads[k] + row->n * p->grad_row_bytes[k] : NULL;
        if (C < LANES) {
            for (int i = 0; i < LANES; i++)
                memcpy(row->copies[0][k] + i * size_of(type),
                       row->z[k] + (i < C ? i : 0) * size_of(type), size_of(type));
            row->z[k] = row->copies[0][k];
            if (row->g[k]) row->g[k] = row->copies[1][k];
        }
        const float top = row->top[k] = highest(row->z[k], type, C);
        if (isnan(top)) return 0;
        double sum, sum_t;
        exponentials(row->z[k], type, C, top, (float)(1 / p->temperature), tempered, row->e[k],
                     row->e_t[k], &sum, &sum_t);
        add_sum(of, at + k, sum);
        if (tempered) add_sum(of_t, at + k, sum_t);
    }
    row->log_sum = of->log_sum + at;
    row->scale = of->scale + at;
    row->log_sum_t = of_t->log_sum + at;
    row->scale_t = of_t->scale + at;
    return 1;
}

/* A row's terms of the sums, and its gradients, once it is normalised. */
INLINE void finish_row(const Problem *p, const Row *row, Lanes *lanes, Totals *totals, Sums *sums,
                       int K, int narrow, int tempered, int stats, int grads, int mixed) {
    const int64_t C = p->C;
    const double spread = p->smoothing / (double)C;
    const View v = view_of(p, row, K, narrow, tempered);
    for (int k = 0; k < K; k++) {
        const int type = narrow ? p->types[k] : FLOAT32;
        const float at_y = load_one(row->z[k], type, row->y), top = row->top[k];
        sums->ce[k] += (1 - p->smoothing) * ((double)row->log_sum[k] - ((double)at_y - top));
        if (stats && at_y == top) { /* ties go to the first class */
            int64_t c = 0;
            while (c < row->y && load_one(row->z[k], type, c) != top) c++;
            sums->correct[k] += c == row->y;
        }
    }
    for (int64_t c = 0; c < whole_vectors(C); c += LANES) {
        terms(&v, lanes, c, 0, K, tempered, stats, grads, mixed);
        if (lanes->vectors == FLUSH) flush(lanes, totals, sums, K, spread, stats, mixed);
    }
    if (C % LANES) {
        terms(&v, lanes, last_vector(C), 1, K, tempered, stats, grads, mixed);
        if (lanes->vectors == FLUSH) flush(lanes, totals, sums, K, spread, stats, mixed);
    }
    for (int k = 0; k < K && C < LANES; k++)
        if (row->g[k])
            memcpy(p->grads[k] + row->n * p->grad_row_bytes[k], row->g[k],
                   C * size_of(p->types[k]));
    if (stats) {
        const float at_y = row->mean[row->y];
        int64_t c = 0;
        while (c < C && (c < row->y ? row->mean[c] < at_y : row->mean[c] <= at_y)) c++;
        sums->together += c == C;
    }
}

/* The rows `begin` to `end`; 0 where one holds a logit that is not finite. Several short rows are
   read before the first is finished, so that none waits for its own sums. */
INLINE int plain_block(const Problem *p, int64_t begin, int64_t end, Sums *sums, float *memory,
                       int K, int narrow, int tempered, int stats, int grads, int mixed) {
    const int64_t width = padded(p->C);
    const int group = (int)plain_group(K, p->C);
    Lanes lanes;
    Totals totals;
    Row rows[GROUP];
    Normalisers of, of_t;
    begin_sums(&lanes, &totals, K, stats, mixed);
    for (int i = 0; i < group; i++) {
        rows[i].mean = memory;
        for (int k = 0; k < K; k++) {
            rows[i].e[k] = memory + (1 + 2 * (i * K + k)) * width;
            rows[i].e_t[k] = rows[i].e[k] + width;
        }
    }
    for (int64_t n = begin; n < end;) {
        int count = 0;
        for (; n < end && count < group; n++) {
            Row *row = &rows[count];
            row->n = n;
            row->y = label(p, n);
            if (row->y == p->ignore_index) {
                for (int k = 0; k < K && grads; k++)
                    if (p->grads[k])
                        memset(p->grads[k] + n * p->grad_row_bytes[k], 0,
                               p->C * size_of(p->types[k]));
                continue;
            }
            if (!read_row(p, row, &of, &of_t, count * K, K, narrow, tempered, grads)) return 0;
            count++;
        }
        normalise(&of, count * K);
        if (tempered) normalise(&of_t, count * K);
        for (int i = 0; i < count; i++)
            finish_row(p, &rows[i], &lanes, &totals, sums, K, narrow, tempered, stats, grads, mixed);
    }
    flush(&lanes, &totals, sums, K, p->smoothing / (double)p->C, stats, mixed);
    for (int k = 0; k < K && K > 1; k++) {
        if (!mixed) sums->kl[k] = (totals.energy - totals.pull[k]) / (K - 1);
        for (int l = 0; l < K && stats; l++)
            sums->pair[l][k] = totals.cross[l][l] - totals.cross[l][k];
    }
    return 1;
}

typedef int Rows(const Problem *p, int64_t begin, int64_t end, Sums *sums, float *memory);

/* `plain_block` with constants: training of the most usual numbers of peers, two of them also with the
   statistics of a training step, whose values then stay in registers; other float32; all else; and the
   mean as the teacher. */
static int two_peers(const Problem *p, int64_t begin, int64_t end, Sums *sums, float *memory) {
    return plain_block(p, begin, end, sums, memory, 2, 0, 0, 0, 1, 0);
}
static int two_peers_and_statistics(const Problem *p, int64_t begin, int64_t end, Sums *sums,
                                    float *memory) {
    return plain_block(p, begin, end, sums, memory, 2, 0, 0, 1, 1, 0);
}
static int two_tempered_peers(const Problem *p, int64_t begin, int64_t end, Sums *sums, float *memory) {
    return plain_block(p, begin, end, sums, memory, 2, 0, 1, 0, 1, 0);
}
static int four_peers(const Problem *p, int64_t begin, int64_t end, Sums *sums, float *memory) {
    return plain_block(p, begin, end, sums, memory, 4, 0, 0, 0, 1, 0);
}
static int eight_peers(const Problem *p, int64_t begin, int64_t end, Sums *sums, float *memory) {
    return plain_block(p, begin, end, sums, memory, 8, 0, 0, 0, 1, 0);
}
static int float32_peers(const Problem *p, int64_t begin, int64_t end, Sums *sums, float *memory) {
    return plain_block(p, begin, end, sums, memory, (int)p->K, 0, p->temperature != 1 && p->K > 1,
                       p->stats != NULL, 1, 0);
}
static int any_peers(const Problem *p, int64_t begin, int64_t end, Sums *sums, float *memory) {
    return plain_block(p, begin, end, sums, memory, (int)p->K, 1, p->temperature != 1 && p->K > 1,
                       p->stats != NULL, p->any_grads, 0);
}
static int taught_by_mean(const Problem *p, int64_t begin, int64_t end, Sums *sums, float *memory) {
    return plain_block(p, begin, end, sums, memory, (int)p->K, 1, p->temperature != 1,
                       p->stats != NULL, p->any_grads, 1);
}

static Rows *choose_plain(const Problem *p) {
    if (p->target == ENSEMBLE) return taught_by_mean;
    for (int k = 0; k < p->K; k++)
        if (p->types[k] != FLOAT32 || !p->any_grads) return any_peers;
    if (p->stats) return p->K == 2 && p->temperature == 1 ? two_peers_and_statistics : float32_peers;
    if (p->K == 2) return p->temperature == 1 ? two_peers : two_tempered_peers;
    if (p->K == 4 && p->temperature == 1) return four_peers;
    if (p->K == 8 && p->temperature == 1) return eight_peers;
    return float32_peers;
}
