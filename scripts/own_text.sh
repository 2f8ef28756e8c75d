#!/usr/bin/env bash
# The built-in data: byte tokens of this project's own sources and documents, for the demo and for experiments of size tiny.
#
#     scripts/own_text.sh PREFIX        writes PREFIX_train.bin, PREFIX_val.bin and PREFIX_tokenizer.bin
#
# A relative PREFIX counts from the project's folder.
set -euo pipefail
cd "$(dirname "$0")/.."
prefix=${1:?expected what the names of the token files begin with, such as data/demo}

mkdir -p "$(dirname "$prefix")"
export LC_ALL=C # the same order of documents everywhere
documents=$(ls README.md data/README.md doc/*.md Makefile ./*.c llmc/*.h dev/*/*.c dev/*/*.h | grep -v unicode.h) # a table, no text
build/text_to_tokens --out "$prefix" $documents
