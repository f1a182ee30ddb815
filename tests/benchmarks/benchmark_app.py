"""
Measures how soon the app is usable, and how fast it draws: run nothing else beside it.

    python tests/benchmarks/benchmark_app.py
    python tests/benchmarks/benchmark_app.py runs/ddpm-digits --requests 5

Prints the seconds from the command to the page, to the first 16 images, and of each of `--requests` further requests for 16
images with the default settings, as a client of the API sees them, with the CPU seconds that the server takes for one.
"""

import argparse
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
from gradio_client import Client


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_for_page(url: str, process: subprocess.Popen) -> None:
    while process.poll() is None:
        try:
            urllib.request.urlopen(url).read()
            return
        except urllib.error.URLError:
            time.sleep(0.05)
    raise SystemExit("The app did not start.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("checkpoints", nargs="*", help="default: the published models, of which the first is MNIST's")
    parser.add_argument("--requests", type=int, default=5)
    args = parser.parse_args()

    port, began = free_port(), time.perf_counter()
    command = [sys.executable, "-m", "tiny_diffusers.cli", "app", *args.checkpoints, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for_page(f"http://127.0.0.1:{port}/", process)
            print(f"page: {time.perf_counter() - began:.1f} s")
            client = Client(f"http://127.0.0.1:{port}/", verbose=False)
            server, seconds, cpu_seconds = psutil.Process(process.pid), [], []
            for seed in range(args.requests + 1):
                started, before = time.perf_counter(), sum(server.cpu_times()[:2])
                client.predict(0, 16, seed, api_name="/generate")
                seconds.append(time.perf_counter() - started)
                cpu_seconds.append(sum(server.cpu_times()[:2]) - before)
                if seed == 0:
                    print(f"first 16 images: {time.perf_counter() - began:.1f} s from the command")
            median, of_cpu = statistics.median(seconds[1:]), statistics.median(cpu_seconds[1:])
            print(f"16 images: {median:.1f} s, of {of_cpu:.1f} CPU seconds, the medians of {args.requests} requests")
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
