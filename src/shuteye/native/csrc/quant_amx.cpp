// Quantized matrices with AMX (tiles of int8), and AVX-512 VNNI for what fills no tile.
#define SHUTEYE_ISA shuteye_quant_amx
#define SHUTEYE_LANES_AVX512
#define SHUTEYE_AMX_INT8
#include "quant_tiles.h"

namespace shuteye {
void add_quant_amx(KernelTable& table) {
  SHUTEYE_ISA::fill_table(table);
  table.linear[kQuantForm].rows = SHUTEYE_ISA::quant_tile_rows;
}
} // namespace shuteye
