/* All kernels at one level: included once for each, without a guard. */
#include "vectors.h"
#include "normals.h"
#include "gram.h"
#undef NAME
#undef WIDTH
#undef floats
#undef ints
#undef load
#undef store
