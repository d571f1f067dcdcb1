"""Clients for locust, one in five of which cuts its connection: ``locust -f tests/ch14/server/cutting_clients.py``."""

import random

from locust import HttpUser, constant, task

CUT = 0.2


class Client(HttpUser):
    """Asks again as soon as it has its answer."""

    wait_time = constant(0.05)

    @task
    def ask(self):
        body = {
            "model": "tiny", "prompt": "Once " * random.randint(1, 60), "max_tokens": random.randint(1, 120),
            "stream": random.random() < 0.7, "n": random.choice((1, 1, 1, 2)), "temperature": random.random(),
            "stop": random.choice((None, " the", ".")),
        }  # fmt: skip
        lines = random.randint(0, 40) if random.random() < CUT else None  # after which it goes
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True, timeout=60) as answer:
            if answer.status_code in (429, 503) and int(answer.headers["Retry-After"]) > 0:
                answer.success()
            elif answer.status_code != 200:
                answer.failure(f"{answer.status_code} {answer.text[:200]}")
            else:
                for _ in answer.iter_lines() if lines is None else zip(range(lines), answer.iter_lines()):
                    pass
                answer.close()
                answer.success()
