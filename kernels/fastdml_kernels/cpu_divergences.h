/* Divergences between a student and its teachers, each of them a peer or a mixture of peers. Rows are
   in scratch memory, padded to whole vectors with classes of probability 0. */

/* A teacher's or a student's distribution: probabilities q, and their logarithms, of which only
   differences are needed exactly, as log q = x factor - offset. */
typedef struct {
    const float *q, *x;
    float factor, offset;
} Distribution;

INLINE vec log_of(const Distribution *d, int64_t c) {
    return muladd(get(d->x, c), all(d->factor), all(-d->offset));
}

/* exp(x factor) to e; its sum. */
INLINE double exponentials_of(const float *x, int64_t C, float factor, float *e) {
    double sum = 0;
    for (int64_t start = 0; start < C; start += FLUSH * LANES) {
        const int64_t end = start + FLUSH * LANES < C ? start + FLUSH * LANES : C;
        vec part = all(0);
        for (int64_t c = start; c < end; c += LANES) {
            const vec value = exp_(get(x, c) * factor);
            put(e, c, value);
            part += value;
        }
        sum += total(part);
    }
    return sum;
}

INLINE void scale_row(float *e, int64_t C, float scale) {
    for (int64_t c = 0; c < C; c += LANES) put(e, c, get(e, c) * scale);
}

/* The mixture of teachers in positive shares that add up to 1: of probabilities. It is found relative
   to the most likely of them, so that equal ones give exactly themselves. With `pull`, unless NULL, the
   student's gradient of the forward KL as `meet` finds it of the teachers one by one, of their
   weights: the same number, here with the same bits. */
INLINE Distribution mix_probabilities(int64_t C, const Distribution *student, const Distribution *peers,
                                      const float *weights, const float *share, int count,
                                      float *q_of, float *log_of_q, float *pull) {
    for (int64_t c = 0; c < C; c += LANES) {
        vec top = all(-INFINITY), q = all(0), sum = all(0), sum_less_1 = all(0), toward = all(0);
        vec logs[PEERS];
        for (int l = 0; l < count; l++) {
            const vec t = get(peers[l].q, c);
            logs[l] = log_of(&peers[l], c);
            top = maximum(logs[l], top);
            q = maximum(t, q);
            if (pull) toward = muladd(all(weights[l]), get(student->q, c) - t, toward);
        }
        if (pull) put(pull, c, toward);
        for (int l = 0; l < count; l++) {
            vec less_1;
            const vec ratio = exp_and_expm1(logs[l] - top, &less_1);
            sum_less_1 = muladd(less_1, all(share[l]), sum_less_1);
            sum = muladd(ratio, all(share[l]), sum);
        }
        const ints near = sum_less_1 > -0.5f;
        const vec ratio = choose(near, sum_less_1 + 1.0f, sum);
        put(q_of, c, q * ratio);
        put(log_of_q, c, top + log_(ratio, choose(near, sum_less_1, ratio - 1.0f)));
    }
    return (Distribution){q_of, log_of_q, 1, 0};
}

/* The same, of logits; `padding` is the logit of the classes from C on. */
INLINE Distribution mix_logits(int64_t C, const Distribution *peers, const float *share, int count,
                               float padding, float *q_of, float *x_of) {
    const float factor = peers[0].factor;
    for (int64_t c = 0; c < C; c += LANES) {
        const vec base = get(peers[0].x, c);
        vec sum = all(0);
        for (int l = 1; l < count; l++)
            sum = muladd(get(peers[l].x, c) - base, all(share[l]), sum);
        put(x_of, c, base + sum);
    }
    for (int64_t c = C; c % LANES; c++) x_of[c] = x_of[0];
    vec high = get(x_of, 0);
    for (int64_t c = LANES; c < C; c += LANES) high = maximum(get(x_of, c), high);
    const float top = largest(high);
    for (int64_t c = 0; c < C; c += LANES) put(x_of, c, get(x_of, c) - top);
    for (int64_t c = C; c % LANES; c++) x_of[c] = padding;
    const double sum = exponentials_of(x_of, C, factor, q_of);
    scale_row(q_of, C, (float)(1 / sum));
    return (Distribution){q_of, x_of, factor, (float)log(sum)};
}

/* One student against its teachers: the divergence from each, times its weight, summed over classes
   and teachers; and with `slope`, unless NULL, the gradient with respect to the student's z / T.

   The gradient of the forward KL is q - t. In the others a term a of the class appears as q (a -
   sum of q a), and that sum is known only after a pass: `pull` holds the first kind, `slope` a. */
INLINE double meet(int64_t C, const Distribution *student, const Distribution *teachers,
                   const float *weights, int count, int divergence, float beta, float *pull,
                   float *slope) {
    double value = 0, mean_slope = 0;
    for (int64_t start = 0; start < C; start += FLUSH * LANES) {
        const int64_t end = start + FLUSH * LANES < C ? start + FLUSH * LANES : C;
        vec values = all(0), slopes = all(0);
        for (int64_t c = start; c < end; c += LANES) {
            const vec log_q = log_of(student, c), q = get(student->q, c);
            vec toward = all(0), a = all(0);
            for (int l = 0; l < count; l++) {
                const vec w = all(weights[l]), t = get(teachers[l].q, c);
                const vec gap = log_of(&teachers[l], c) - log_q;
                if (divergence == FORWARD) {
                    values = muladd(w * t, gap, values);
                    toward = muladd(w, q - t, toward);
                } else if (divergence == REVERSE) {
                    a = muladd(w, -gap, a);
                } else if (divergence == JEFFREYS) { /* w is half the weight */
                    values = muladd(w * (t - q), gap, values);
                    toward = muladd(w, q - t, toward);
                    a = muladd(w, -gap, a);
                } else { /* log of t / m and q / m, m the mixture, relative to the larger of both */
                    const vec far = maximum(gap, -gap);
                    const ints ahead = gap > 0.0f; /* of the teacher */
                    const vec lesser = choose(ahead, all(1 - beta), all(beta));
                    const vec log_m = log1p_(lesser * expm1_(-far));
                    const vec of_t = minimum(gap, all(0)) - log_m, of_q = -log_m - maximum(gap, all(0));
                    values = muladd(w * (beta * t), of_t, values);
                    values = muladd(w * ((1 - beta) * q), of_q, values);
                    a = muladd(w * (1 - beta), of_q, a);
                }
            }
            if (divergence == REVERSE) values = muladd(q, a, values);
            slopes = muladd(q, a, slopes);
            if (!pull) continue;
            put(pull, c, toward);
            if (divergence != FORWARD) put(slope, c, a);
        }
        value += total(values);
        if (divergence != FORWARD) mean_slope += total(slopes);
    }
    if (pull && divergence != FORWARD) {
        const float mean = (float)mean_slope;
        for (int64_t c = 0; c < C; c += LANES) {
            const vec own = get(student->q, c) * (get(slope, c) - mean);
            put(pull, c, divergence == JEFFREYS ? get(pull, c) + own : own);
        }
    }
    return value;
}
