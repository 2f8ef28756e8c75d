# `make` builds the CPU trainer, `make help` lists every target, `make info` says what was found on this machine.
#
# Needs GNU make and a C compiler; OpenMP is used where it works. To override: CC, CFLAGS (optimisation and warnings),
# ARCH (the instruction set), OPENMP, NVCC, GPU_ARCH; WERROR=1 turns warnings into errors. Every program is one
# compilation of one file that includes the headers it needs. All that is built goes to build/, but for the trainers.

BUILD := build
# -fno-math-errno: nobody reads errno after sqrt(), and with it sqrt() cannot be vectorised (AdamW: 2.5 times the speed).
CFLAGS ?= -O3 -fno-math-errno -Wall -Wextra
CLANG_FORMAT ?= $(or $(shell command -v clang-format-14 2>/dev/null),clang-format)

.PHONY: info test test-gpu sanitize-gpu test-python venv asan demo bench bench-gpu bench-gpu-ops check-cxx format format-check clean help FORCE
.DEFAULT_GOAL := train_gpt

# ----------------------------------------------------------------------------------------------------------------------
# What this machine has

ifneq ($(filter-out clean help format format-check,$(or $(MAKECMDGOALS),train_gpt)),)

ifeq ($(origin CC),default)
CC := $(or $(firstword $(foreach c,cc gcc clang,$(if $(shell command -v $(c) 2>/dev/null),$(c)))),cc)
endif
ifeq ($(origin CXX),default)
CXX := $(if $(findstring clang,$(notdir $(CC))),clang++,c++)
endif

# $(call try,FLAGS,MORE): FLAGS, if an empty program compiles and links with FLAGS and MORE; else nothing.
try = $(shell t=$$(mktemp) && echo 'int main(void) { return 0; }' | $(CC) -x c - -Werror $(1) $(2) -o $$t 2>/dev/null \
        && echo '$(1)'; rm -f $$t)

ifeq ($(origin ARCH),undefined)
ifneq ($(filter arm64 aarch64,$(shell uname -m)),)
ARCH := $(or $(call try,-mcpu=native),$(call try,-march=native))
else
ARCH := $(call try,-march=native)
endif
endif

ifeq ($(origin OPENMP),undefined)
OPENMP := $(call try,-fopenmp,-include omp.h)
LIBOMP := $(firstword $(wildcard /opt/homebrew/opt/libomp /usr/local/opt/libomp))
ifeq ($(OPENMP),)
OPENMP := $(if $(LIBOMP),$(call try,-Xclang -fopenmp -I$(LIBOMP)/include -L$(LIBOMP)/lib -lomp,-include omp.h))
endif
endif

NVCC := $(or $(NVCC),$(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc)))
CUDA := $(patsubst %/bin/nvcc,%,$(NVCC))
NCCL := $(if $(NVCC),$(call try,-lnccl,-include nccl.h -I$(CUDA)/include -L$(CUDA)/lib64))
ifeq ($(origin GPU_ARCH),undefined)
GPU_ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
# sm_90a is sm_90 with the instructions that only Hopper has.
GPU_ARCH := $(patsubst sm_90,sm_90a,$(addprefix sm_,$(GPU_ARCH)))
endif

ifeq ($(MAKELEVEL),0)
$(info compiler  $(or $(shell $(CC) --version 2>/dev/null | head -n 1),$(CC): not found; install gcc or clang or say make CC=...) $(ARCH))
$(info OpenMP    $(or $(OPENMP),not found: one thread only (gcc needs libgomp and clang libomp; on macOS: brew install libomp)))
$(info nvcc      $(or $(NVCC),not found (the CPU trainer needs none)))
$(info GPU       $(or $(GPU_ARCH),none found))
$(info NCCL      $(if $(NCCL),found,not found))
endif
endif

# ----------------------------------------------------------------------------------------------------------------------
# Programs

REVISION := $(or $(shell git describe --always --dirty --abbrev=12 2>/dev/null),unknown)
ALL_CFLAGS = -std=gnu11 $(CFLAGS) $(ARCH) $(or $(OPENMP),$(call try,-fopenmp-simd) -Wno-unknown-pragmas) $(if $(filter 1,$(WERROR)),-Werror )-I.
COMPILE = $(CC) $(ALL_CFLAGS) $(DEFINES) -MMD -MP -MF $(BUILD)/$(notdir $@).d -MT $@ $< -o $@ -lm

train_gpt: DEFINES = -DGIT_REVISION='"$(REVISION)"' -DBUILD_FLAGS='"$(CC) $(ALL_CFLAGS)"'
train_gpt: train_gpt.c $(BUILD)/flags $(BUILD)/revision ## the CPU trainer (what `make` alone builds)
	$(COMPILE)

# In double, loops marked `omp simd` call the C library's exp and erf, which clang regrets not to vectorise.
$(BUILD)/test_gpt_double: DEFINES = -DREAL=double -Wno-pass-failed
$(BUILD)/test_gpt $(BUILD)/test_gpt_double: test_gpt.c $(BUILD)/flags
	$(COMPILE)

$(BUILD)/%: dev/test/%.c $(BUILD)/flags
	$(COMPILE)

$(BUILD)/%: dev/data/%.c $(BUILD)/flags
	$(COMPILE)

$(BUILD)/%: dev/bench/%.c $(BUILD)/flags
	$(COMPILE)

# What the last build was made with: programs are built again when it changes.
$(BUILD)/flags: STAMP = $(CC) $(ALL_CFLAGS)
$(BUILD)/revision: STAMP = $(REVISION)
$(BUILD)/cuda_flags: STAMP = $(NVCC) $(NVCC_FLAGS)
$(BUILD)/trainer_flags: STAMP = $(FP32_FLAG)
$(BUILD)/flags $(BUILD)/revision $(BUILD)/cuda_flags $(BUILD)/trainer_flags: FORCE
	@mkdir -p $(BUILD)
	@echo '$(STAMP)' | cmp -s - $@ || echo '$(STAMP)' > $@

-include $(wildcard $(BUILD)/*.d)

# ----------------------------------------------------------------------------------------------------------------------
# Tests, checks, demo

TESTS := $(patsubst dev/test/%.c,$(BUILD)/%,$(sort $(wildcard dev/test/test_*.c))) \
         $(BUILD)/test_gpt $(BUILD)/test_gpt_double

test: $(TESTS) ## every test, the whole model in float and in double; the last line counts them
	@sh dev/test/run.sh $(TESTS)

asan: ## the tests again under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(MAKE) --no-print-directory test BUILD=build/asan \
	    CFLAGS='-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -Wall -Wextra'

# Python: the float64 reference, the tools for logs and experiments. PYTHON (3.11 or later) makes the environment; PIP_FLAGS
# is for pip: on a machine without a network '--no-index --find-links FOLDER', the folder being filled elsewhere by
# `pip download -r scripts/requirements.txt -d FOLDER`.
PYTHON ?= python3
VENV := .venv
venv: $(VENV)/installed ## the pinned Python packages of scripts/requirements.txt, in .venv
$(VENV)/installed: scripts/requirements.txt
	@$(PYTHON) -m venv $(VENV) || { echo "error: '$(PYTHON) -m venv' failed; it needs Python 3.11 or later with venv" \
	    "(Debian, Ubuntu: apt-get install python3-venv), or say make venv PYTHON=..." >&2; exit 1; }
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r $< || { \
	    echo "error: pip could not install $<; without a network: make venv PIP_FLAGS='--no-index --find-links FOLDER'" \
	    "(see the Makefile)" >&2; exit 1; }
	@touch $@

PYTHON_TESTS := dev/reference/test_reference.py dev/test_logs.py dev/data/test_tokenize.py scripts/test_report.py \
                scripts/test_chinchilla.py
test-python: venv train_gpt $(BUILD)/text_to_tokens ## the trainer against the float64 reference in JAX; the Python tools
	@sh dev/test/run.sh $(PYTHON_TESTS:%='$(VENV)/bin/python %')

demo: train_gpt $(BUILD)/text_to_tokens ## trains a small GPT on this project's own text, under three minutes
	@bash scripts/demo.sh

# BENCH: the sections of dev/bench/bench.c to run, all if empty. LLMC: the folder of an llm.c checkout to compare with;
# PYTHON: a Python that can import torch, likewise.
bench: $(BUILD)/bench $(if $(LLMC),$(BUILD)/llmc_step) ## speed beside its ceilings
	@torch=; if $(PYTHON) -c 'import torch' 2>/dev/null; then torch='--python $(PYTHON)'; fi; \
	$(BUILD)/bench $(BENCH) $(if $(LLMC),--llmc $(BUILD)/llmc_step) $$torch

$(BUILD)/llmc_step: dev/bench/llmc_step.c $(BUILD)/flags FORCE
	$(CC) -Ofast $(ARCH) $(if $(OPENMP),$(OPENMP) -DOMP) -w -I$(LLMC) $< -o $@ -lm

check-cxx: ## every header of llmc/ alone, as C11 and as C++17
	@for h in llmc/*.h; do \
	    echo "$$h" && \
	    $(CC) -std=gnu11 -Wall -Wextra -Werror -fsyntax-only -include $$h -x c /dev/null && \
	    $(CXX) -std=c++17 -Wall -Wextra -Werror -fsyntax-only -include $$h -x c++ /dev/null || exit 1; \
	done

SOURCES = $(wildcard *.c *.cu llmc/*.h llmc/*.cuh dev/*/*.c dev/*/*.h dev/*/*.cu dev/*/*.cuh)

format: ## rewrites the sources in the committed style
	$(CLANG_FORMAT) -i $(SOURCES)

format-check: ## fails if `make format` would change a file (clang-format 14; other versions may differ in details)
	$(CLANG_FORMAT) --dry-run -Werror $(SOURCES)

info: ## what was found: compiler, OpenMP, nvcc, GPU, NCCL
	@:

clean: ## removes all that was built; data/ and out/ stay
	rm -rf build train_gpt train_gptcu

help:: ## this list
	@awk -F ':+ .*## ' '/^[a-z_-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

# ----------------------------------------------------------------------------------------------------------------------
# The CUDA trainer. Each of its operations has a program in dev/cuda that checks and times it, in bf16 and in fp32.
#
# PRECISION=FP32 builds the trainer in fp32. Without a GPU on this machine say for which one to build: GPU_ARCH=sm_90a.

comma := ,
need_nvcc = $(if $(NVCC),,$(error this needs nvcc, which was not found: install the CUDA toolkit or say make NVCC=/path/to/nvcc))$(if \
            $(GPU_ARCH),,$(error nvidia-smi names no GPU on this machine: say for which one to build, such as make GPU_ARCH=sm_90a))
NVCC_FLAGS = -std=c++17 -O3 -I. $(if $(GPU_ARCH),-gencode=arch=compute_$(GPU_ARCH:sm_%=%)$(comma)code=$(GPU_ARCH)) \
             $(if $(filter 1,$(WERROR)),-Werror all-warnings -Xcompiler -Wall$(comma)-Wextra)
NVCC_LIBS = -lcublasLt -lcublas
ifneq ($(filter-out BF16 FP32,$(PRECISION)),)
$(error PRECISION=$(PRECISION): expected BF16 (the default) or FP32)
endif
FP32_FLAG = $(if $(filter FP32,$(PRECISION)),-DPRECISION_FP32)
COMPILE_CUDA = $(need_nvcc)$(NVCC) $(NVCC_FLAGS) $(DEFINES) -MMD -MP -MF $(BUILD)/$(notdir $@).d -MT $@ $< $(filter %.o,$^) -o $@ $(NVCC_LIBS)

train_gptcu: DEFINES = $(FP32_FLAG) -DGIT_REVISION='"$(REVISION)"' -DBUILD_FLAGS='"nvcc $(NVCC_FLAGS) $(FP32_FLAG)"'
train_gptcu: train_gpt.cu $(BUILD)/cuda_flags $(BUILD)/trainer_flags $(BUILD)/revision ## the CUDA trainer
	$(COMPILE_CUDA)

CUDA_NAMES := $(patsubst dev/cuda/%.cu,%,$(sort $(wildcard dev/cuda/*.cu)))
CUDA_PROGRAMS := $(CUDA_NAMES:%=$(BUILD)/cuda_%) $(CUDA_NAMES:%=$(BUILD)/cuda_fp32_%)

$(CUDA_NAMES:%=$(BUILD)/cuda_fp32_%): DEFINES = -DPRECISION_FP32
$(CUDA_NAMES:%=$(BUILD)/cuda_fp32_%): $(BUILD)/cuda_fp32_%: dev/cuda/%.cu $(BUILD)/cuda_flags
	$(COMPILE_CUDA)

$(CUDA_NAMES:%=$(BUILD)/cuda_%): $(BUILD)/cuda_%: dev/cuda/%.cu $(BUILD)/cuda_flags
	$(COMPILE_CUDA)

# The CPU trainer's model, in float and in double, which the CUDA trainer is compared with.
CPU_OBJECTS := $(BUILD)/cpu_float.o $(BUILD)/cpu_double.o
$(CPU_OBJECTS): $(BUILD)/cpu_%.o: dev/test/cpu_backend.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -Wno-pass-failed -DREAL=$* -DCPU_OPEN=cpu_open_$* -MMD -MP -MF $@.d -MT $@ -c $< -o $@

GPT_TESTS := $(BUILD)/test_gptcu $(BUILD)/test_gptcu_fp32
$(BUILD)/test_gptcu_fp32: DEFINES = -DPRECISION_FP32
$(GPT_TESTS): NVCC_LIBS += $(if $(OPENMP),$(if $(findstring clang,$(notdir $(CC))),-lomp,-lgomp))
$(GPT_TESTS): test_gpt.cu $(CPU_OBJECTS) $(BUILD)/cuda_flags
	$(COMPILE_CUDA)

test-gpu: $(CUDA_PROGRAMS) $(GPT_TESTS) train_gpt train_gptcu $(BUILD)/text_to_tokens ## every test of the CUDA trainer and its operations, on this machine's GPU
	@sh dev/test/run.sh $(CUDA_PROGRAMS:%='% check') $(GPT_TESTS) 'sh dev/test/gpu_runs.sh'

# racecheck needs a build of its own in bf16 (llmc/hopper.cuh says why); matrix products, the library's, it takes for races.
RACE_PROGRAMS := $(patsubst %,$(BUILD)/race_%,$(filter-out matmul,$(CUDA_NAMES)))
$(RACE_PROGRAMS): DEFINES = -DRACECHECK
$(RACE_PROGRAMS): $(BUILD)/race_%: dev/cuda/%.cu $(BUILD)/cuda_flags
	$(COMPILE_CUDA)

SANITIZE = compute-sanitizer --error-exitcode 1 --tool
sanitize-gpu: $(CUDA_PROGRAMS) $(RACE_PROGRAMS) ## compute-sanitizer on the CUDA trainer's operations: memcheck and, but for matrix products, racecheck
	@sh dev/test/run.sh $(CUDA_PROGRAMS:%='$(SANITIZE) memcheck % check') $(patsubst %,'$(SANITIZE) racecheck % check',$(RACE_PROGRAMS) $(RACE_PROGRAMS:$(BUILD)/race_%=$(BUILD)/cuda_fp32_%))

# BENCH: sections of dev/bench/gpu_step.py, all if empty. LLMC: a folder with llm.c's CUDA trainers to compare with, which
# dev/bench/llmc_gpu.sh builds.
bench-gpu: train_gptcu ## speed of whole steps on this machine's GPU, beside llm.c's
	$(PYTHON) dev/bench/gpu_step.py $(BENCH) $(if $(LLMC),--llmc $(LLMC))

bench-gpu-ops: $(CUDA_NAMES:%=$(BUILD)/cuda_%) ## times every GPU operation beside its floor
	@for program in $^; do echo "$$program" && $$program || exit 1; done
	@$(PYTHON) dev/bench/gpu_attention.py $(BUILD)/cuda_attention
