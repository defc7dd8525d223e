import json
import math
import sys

VOCABULARY = 257  # bytes, and the document start
print(json.dumps({"protocol": 1, "name": "byte frequencies so far"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    counts, log_probs, distributions = [1] * VOCABULARY, [], []
    ask = {tuple(place) for place in request["ask"]}
    for number, document in enumerate(request["documents"]):
        log_probs.append([])
        for position, token in enumerate(document["tokens"][1:], start=1):
            total = math.log(sum(counts))
            log_probs[-1].append(math.log(counts[token]) - total)
            if (number, position) in ask:
                distributions.append([math.log(count) - total for count in counts])
            counts[token] += 1
    size = sum(len(document["text"].encode()) for document in request["documents"])
    bits = -sum(map(sum, log_probs)) / math.log(2) / size if size else 0.0
    answer = {"log_probs": log_probs, "distributions": distributions, "bytes": size, "bits_per_byte": bits}
    print(json.dumps(answer), flush=True)
