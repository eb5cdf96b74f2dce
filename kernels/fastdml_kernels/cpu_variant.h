/* The loops over rows, for one width of vectors: a file that defines LANES, the instructions, and
   BLOCKS, the function's name, includes this. */

#include "cpu_vectors.h"
#include "cpu_plain_rows.h"
#include "cpu_divergences.h"
#include "cpu_weighted_rows.h"

int BLOCKS(const Problem *p, Sums *sums, int64_t begin, int64_t end, float *memory) {
    memory += (-(uintptr_t)memory / sizeof(float)) % WIDEST; /* to a vector's boundary */
    Rows *rows = p->plain ? choose_plain(p) : weighted_rows;
    for (int64_t b = begin; b < end; b++) {
        Sums *own = sums + b;
        memset(own, 0, sizeof *own);
        const int64_t from = b * BLOCK, to = from + BLOCK < p->N ? from + BLOCK : p->N;
        if (!rows(p, from, to, own, memory)) return 0;
    }
    return 1;
}
