# Says what a machine says of itself, in sections that begin with "@@ NAME". Plain POSIX: it runs under
# dash, busybox, and Android's mksh with toybox, and needs nothing else. Nothing is written.
# PYTHON: the interpreter whose packages are looked at (python3).

unset OMP_NUM_THREADS OMP_THREAD_LIMIT # nproc would obey them

section() { printf '@@ %s\n' "$1"; }
# without zeros, where there is a tr: not every toybox has one
text() { if command -v tr >/dev/null 2>&1; then tr -d '\000' <"$1"; else cat "$1"; fi; }
file() { [ -r "$1" ] && [ -f "$1" ] && { section "$1"; text "$1" 2>/dev/null; echo; }; }

section uname; uname -s; uname -r; uname -m; getconf LONG_BIT 2>/dev/null
section processors; nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null
for one in /proc/cpuinfo /proc/meminfo /etc/os-release /sys/fs/cgroup/memory.max \
	/sys/devices/system/cpu/online /sys/firmware/devicetree/base/model \
	/sys/devices/virtual/dmi/id/product_name; do file "$one"; done

section cpus
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
	[ -d "$cpu" ] || continue
	# name, highest frequency in kHz, capacity (of 1024), identification register
	printf '%s' "${cpu##*/cpu}"
	for one in cpufreq/cpuinfo_max_freq cpu_capacity regs/identification/midr_el1; do
		value=; [ -r "$cpu/$one" ] && read -r value <"$cpu/$one" 2>/dev/null
		printf ' %s' "${value:--}"
	done
	echo
done

section trips # degrees: type of each trip point, thousandths of a degree
for zone in /sys/class/thermal/thermal_zone[0-9]*; do
	for trip in "$zone"/trip_point_[0-9]*_temp; do
		[ -r "$trip" ] || continue
		read -r kind <"${trip%_temp}_type" 2>/dev/null; read -r limit <"$trip" 2>/dev/null
		echo "${kind:--} ${limit:--}"
	done
done

section devices # what drivers of accelerators leave behind
for one in /dev/apex_* /dev/rknpu* /dev/galcore /dev/ethosu* /dev/accel/accel* /dev/dri/renderD* \
	/dev/nvhost-gpu /dev/nvidia0 /dev/kfd /dev/hailo* /dev/mali0 /dev/kgsl-3d0 /dev/edgetpu*; do
	[ -e "$one" ] && echo "$one"
done

section disk; df -k . 2>/dev/null
section libc; getconf GNU_LIBC_VERSION 2>/dev/null
if command -v getprop >/dev/null 2>&1; then
	section getprop; getprop
fi
section python
"${PYTHON:-python3}" -c '
import json, platform, sys
try:
    from importlib import metadata
except ImportError:
    metadata = None
def version(name):
    try:
        return metadata.version(name)
    except Exception:
        return None
names = "numpy", "onnxruntime", "openvino", "ai-edge-litert", "tflite-runtime", "ncnn"
print(json.dumps({"python": platform.python_version(), "libc": " ".join(platform.libc_ver()).strip(),
                  "packages": {name: version(name) for name in names}}))
' 2>&1
section end
