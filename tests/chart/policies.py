"""Who may connect to whom under a set of NetworkPolicies, as the API defines it. Written for what chart and operator render; anything else is an error."""


def matches(selector, labels):
    if selector.keys() - {"matchLabels", "matchExpressions"}:
        raise NotImplementedError(selector)
    for expression in selector.get("matchExpressions", []):
        if expression["operator"] != "In":
            raise NotImplementedError(expression)
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def peer_matches(peer, policy, pod):
    """`pod` is None for what is no pod: a node, the API server, a machine outside."""
    if peer.keys() - {"podSelector", "namespaceSelector"}:
        raise NotImplementedError(peer)
    if pod is None:
        return False
    if "namespaceSelector" in peer:
        in_namespace = matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": pod["namespace"]})
    else:
        in_namespace = pod["namespace"] == policy["metadata"]["namespace"]
    return in_namespace and matches(peer.get("podSelector", {}), pod["labels"])


def allowed(policies, source, target, port):
    """Whether the policies of `target` let `source` connect: all that select it are added up; none means all is allowed."""
    selecting = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == target["namespace"] and matches(policy["spec"]["podSelector"], target["labels"])
    ]
    for policy in selecting:
        if policy["spec"].keys() != {"podSelector", "policyTypes", "ingress"} or policy["spec"]["policyTypes"] != ["Ingress"]:
            raise NotImplementedError(policy["spec"])
        for rule in policy["spec"]["ingress"]:
            port_fits = {"port": port, "protocol": "TCP"} in rule["ports"]
            if port_fits and ("from" not in rule or any(peer_matches(peer, policy, source) for peer in rule["from"])):
                return True
    return not selecting
