"""One run of ours in a process of its own: imports timed, figures printed as a line of JSON.

    python benchmarks/simulation_run.py --model bag --users 10000 --cohort 200 --rounds 20
"""

import time

START = time.perf_counter()


def main() -> None:
    import json

    from simulation_ours import parser, run

    imported = time.perf_counter()
    figures = run(parser().parse_args())
    print(json.dumps(figures | {"import_seconds": imported - START}))


if __name__ == "__main__":
    main()
