/* The loops for any processor, four floats at a time. */

#define LANES 4
#define BLOCKS fastdml_blocks_baseline
#include "cpu_variant.h"
