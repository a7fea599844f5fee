#!/bin/bash
# facts.sh FOLDER MIDR PART REVISION FEATURES MODEL: the files by which runtimes know a board.
# FOLDER/sys has processor topology, caches, MIDR, thermal, cpufreq, device tree; FOLDER/cpuinfo is
# for /proc. Both or neither: one without the other crashes onnxruntime and LiteRT.
set -euo pipefail
R=$1 N=4 MIDR=$2 PART=$3 REV=$4 FEATURES=$5 MODEL=$6
S=$R/sys; rm -rf "$S"; mkdir -p "$S/class/thermal/thermal_zone0" "$S/firmware/devicetree/base" "$S/devices/system/node/node0"
echo 48500 > "$S/class/thermal/thermal_zone0/temp"; echo cpu-thermal > "$S/class/thermal/thermal_zone0/type"
printf '%s\0' "$MODEL" > "$S/firmware/devicetree/base/model"
C=$S/devices/system/cpu; mkdir -p "$C"; last=$((N-1)); mask=$(printf %x $(((1<<N)-1)))
for f in online possible present; do echo 0-$last > "$C/$f"; done
for i in $(seq 0 $last); do d=$C/cpu$i
  mkdir -p "$d/regs/identification" "$d/topology" "$d/cpufreq"
  echo "$MIDR" > "$d/regs/identification/midr_el1"; echo 1 > "$d/online"
  t=$d/topology; echo 0 > $t/physical_package_id; echo $i > $t/core_id; echo 0 > $t/cluster_id
  m=$(printf %x $((1<<i))); for f in thread_siblings core_cpus; do echo $m > $t/$f; echo $i > $t/${f}_list; done
  for f in core_siblings package_cpus cluster_cpus; do echo $mask > $t/$f; echo 0-$last > $t/${f}_list; done
  for f in scaling_cur_freq scaling_max_freq cpuinfo_max_freq; do echo 1500000 > $d/cpufreq/$f; done
  echo 600000 | tee $d/cpufreq/scaling_min_freq > $d/cpufreq/cpuinfo_min_freq; echo ondemand > $d/cpufreq/scaling_governor
  k=0; while read -r lvl typ size shared sharedl ways sets; do x=$d/cache/index$k; mkdir -p $x
    echo $lvl > $x/level; echo $typ > $x/type; echo $size > $x/size; echo $shared > $x/shared_cpu_map; echo $sharedl > $x/shared_cpu_list
    echo 64 > $x/coherency_line_size; echo $ways > $x/ways_of_associativity; echo $sets > $x/number_of_sets; k=$((k+1))
  done <<E
1 Data 32K $m $i 2 256
1 Instruction 48K $m $i 3 256
2 Unified 1024K $mask 0-$last 16 1024
E
done
echo 0-$last > "$S/devices/system/node/node0/cpulist"; echo $mask > "$S/devices/system/node/node0/cpumap"; echo 0 | tee "$S/devices/system/node/online" > "$S/devices/system/node/possible"
echo 0 > "$S/devices/system/node/node0/meminfo"

for i in $(seq 0 $last); do
  printf 'processor\t: %s\nBogoMIPS\t: 108.00\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: %s\nCPU revision\t: %s\n\n' "$i" "$FEATURES" "$PART" "$REV"
done > "$R/cpuinfo"
printf 'Hardware\t: BCM2835\nModel\t\t: %s\n' "$MODEL" >> "$R/cpuinfo"
