// kube-network-policies NODE: judges by NetworkPolicies which connections pods of the node may make and take. The module of that name does it;
// what it judges comes from netfilter's queue 100. Its own program has nftables put packets there, by an expression that not every kernel has.
// Here xtables' NFQUEUE, which more have, does that (lib/agents.sh); without that expression the module says so in the log, and goes on.
package main

import (
	"context"
	"fmt"
	"os"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/kube-network-policies/pkg/networkpolicy"
)

func run(node string) error {
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	if err != nil {
		return err
	}
	// As its own program has it: it takes an empty list of rules, which protobuf leaves out, for one that allows everything.
	config.ContentType = runtime.ContentTypeProtobuf
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	watches := informers.NewSharedInformerFactory(client, 0)
	policies, namespaces, pods := watches.Networking().V1().NetworkPolicies(), watches.Core().V1().Namespaces(), watches.Core().V1().Pods()
	controller, err := networkpolicy.NewController(client, policies, namespaces, pods, nil, nil, nil, nil, networkpolicy.Config{QueueID: 100, NodeName: node})
	if err != nil {
		return err
	}
	ctx := context.Background()
	watches.Start(ctx.Done())
	return controller.Run(ctx)
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "kube-network-policies NODE")
		os.Exit(1)
	}
	fmt.Fprintln(os.Stderr, "kube-network-policies:", run(os.Args[1]))
	os.Exit(1)
}
