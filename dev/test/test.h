/*
The whole test framework. A test program calls CHECK and friends and ends with `return test_summary();`:

    static void test_addition(void) { CHECK(1 + 1 == 2); CHECK_CLOSE(0.1 + 0.2, 0.3, 1e-15); }
    int main(void) { RUN(test_addition); return test_summary(); }

A test is one RUN; it fails if any check in it fails, and goes on to its end, so that one run shows everything.
*/
#ifndef DEV_TEST_TEST_H
#define DEV_TEST_TEST_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int tests_passed = 0, tests_failed = 0, checks_failed = 0;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            checks_failed++;                                                                                           \
            printf("  %s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                                           \
        }                                                                                                              \
    } while (0)

// |a - b| <= tolerance * max(1, |b|): absolute near zero, relative for large numbers. NaN fails.
#define CHECK_CLOSE(a, b, tolerance)                                                                                   \
    do {                                                                                                               \
        double check_a = (a), check_b = (b), check_m = fabs(check_b) > 1 ? fabs(check_b) : 1;                          \
        if (!(fabs(check_a - check_b) <= (tolerance)*check_m)) {                                                       \
            checks_failed++;                                                                                           \
            printf("  %s:%d: failed: %s = %.9g, expected %.9g\n", __FILE__, __LINE__, #a, check_a, check_b);           \
        }                                                                                                              \
    } while (0)

#define CHECK_STR(a, b)                                                                                                \
    do {                                                                                                               \
        const char *check_a = (a), *check_b = (b);                                                                     \
        if (strcmp(check_a, check_b) != 0) {                                                                           \
            checks_failed++;                                                                                           \
            printf("  %s:%d: failed: %s = \"%s\", expected \"%s\"\n", __FILE__, __LINE__, #a, check_a, check_b);       \
        }                                                                                                              \
    } while (0)

// The statement, run in a child process, must end it with status 2 and exactly one line on stderr that contains `text`.
#define CHECK_DIES(statement, text)                                                                                    \
    do {                                                                                                               \
        int check_pipe[2], check_status = 0;                                                                           \
        fflush(stdout);                                                                                                \
        pid_t check_pid = pipe(check_pipe) == 0 ? fork() : -1;                                                         \
        if (check_pid == 0) {                                                                                          \
            dup2(check_pipe[1], 2);                                                                                    \
            if (freopen("/dev/null", "w", stdout) == NULL) { _exit(98); }                                              \
            statement;                                                                                                 \
            _exit(99);                                                                                                 \
        }                                                                                                              \
        close(check_pipe[1]);                                                                                          \
        char check_out[4096];                                                                                          \
        size_t check_n = 0;                                                                                            \
        ssize_t check_r;                                                                                               \
        while (check_n < sizeof check_out - 1 &&                                                                       \
               (check_r = read(check_pipe[0], check_out + check_n, sizeof check_out - 1 - check_n)) > 0) {             \
            check_n += (size_t)check_r;                                                                                \
        }                                                                                                              \
        check_out[check_n] = '\0';                                                                                     \
        close(check_pipe[0]);                                                                                          \
        waitpid(check_pid, &check_status, 0);                                                                          \
        if (!(WIFEXITED(check_status) && WEXITSTATUS(check_status) == 2 && strstr(check_out, text) != NULL &&          \
              strchr(check_out, '\n') == check_out + check_n - 1)) {                                                   \
            checks_failed++;                                                                                           \
            printf("  %s:%d: failed: %s must exit with status 2 and say '%s'; status %d, it said: %s\n", __FILE__,     \
                   __LINE__, #statement, text, WIFEXITED(check_status) ? WEXITSTATUS(check_status) : -1, check_out);   \
        }                                                                                                              \
    } while (0)

#define RUN(test)                                                                                                      \
    do {                                                                                                               \
        int before = checks_failed;                                                                                    \
        test();                                                                                                        \
        if (checks_failed == before) {                                                                                 \
            tests_passed++;                                                                                            \
        } else {                                                                                                       \
            tests_failed++;                                                                                            \
            printf("FAILED %s\n", #test);                                                                              \
        }                                                                                                              \
        fflush(stdout);                                                                                                \
    } while (0)

static int test_summary(void) {
    printf("%d passed, %d failed\n", tests_passed, tests_failed);
    return tests_failed == 0 && tests_passed > 0 ? 0 : 1;
}

#endif
