#!/bin/sh
# Runs the test programs given as arguments ("program" or "program argument"), one after the other. Each ends with the line "N passed, N failed"; the last
# line here is their sum. A program that ends with an error without such a line, or whose line admits no failure (a crash,
# a sanitizer's report), counts as one failed test. Exits with 1 if any test failed or none ran.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" # no test measures time, and spinning threads crawl on a busy machine
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
passed=0 failed=0
for program in "$@"; do
    echo "$program"
    $program >"$log" 2>&1 # unquoted: it may have arguments
    status=$?
    sed 's/^/  /' "$log"
    summary=$(sed -n 's/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\1 \2/p' "$log" | tail -n 1)
    program_passed=${summary% *} program_failed=${summary#* }
    if [ -z "$summary" ] || { [ "$status" -ne 0 ] && [ "$program_failed" -eq 0 ]; }; then
        echo "  FAILED: $program ended with status $status"
        failed=$((failed + 1))
    fi
    passed=$((passed + ${program_passed:-0})) failed=$((failed + ${program_failed:-0}))
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
